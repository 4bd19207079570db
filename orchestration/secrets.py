"""What no message, tag, page or other user may read."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mar.errors import notice


def has_secrets(text: str) -> bool:
    """Whether an address in a text has a user or a password."""
    return without_secrets(text) != text


def without_secrets(text: str) -> str:
    """Return a text with the user and password of every address in it left out."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def close_token_file() -> None:
    """Take everybody else's right to read the file of Ray's token, which Ray makes readable for all.

    Who has the token of a cluster can run any code there.
    """
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        mode = file.stat().st_mode & 0o777
        if not mode & 0o077:
            return
        file.chmod(0o600)
    except FileNotFoundError:
        return
    except OSError as error:
        notice(f"others on this machine can read Ray's token, {file}, and it cannot be changed ({error})")
        return
    notice(f"others on this machine could read Ray's token, {file} (mode {mode:o}); now only you can")


def write_private(file: Path, text: str) -> None:
    """Write a file that its owner alone can read, from its first byte on."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
