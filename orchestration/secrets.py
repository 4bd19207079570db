"""Keeps passwords, tokens and webhooks out of messages, tags, pages and files of others."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mar.errors import UserError, notice


def has_secrets(text: str) -> bool:
    """Whether an address in a text has a user or a password."""
    return without_secrets(text) != text


def without_secrets(text: str) -> str:
    """Return a text with the user and password of every address in it left out."""
    # Between "://" and the last "@" before the path: a password may contain an "@".
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def close_token_file() -> None:
    """Let only the owner read the file of Ray's token, which Ray makes readable for all.

    Whoever has the token of a cluster can run any code there.
    """
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        mode = file.stat().st_mode & 0o777
        # No right for the group or others: nothing to change, and nothing to report.
        if not mode & 0o077:
            return
        file.chmod(0o600)
    except FileNotFoundError:
        return
    except OSError as error:
        notice(
            f"others on this machine can read Ray's token, {file}, and it cannot be changed "
            f"({error})"
        )
        return
    notice(
        f"others on this machine could read Ray's token, {file} (mode {mode:o}); now only you can"
    )


def webhook_of(given: str) -> str:
    """Return the address that was given, or, for ``@FILE``, the one in the file.

    Raises:
        UserError: it is not an address, or the file cannot be read.
    """
    address = given
    if given.startswith("@"):
        try:
            address = Path(given[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--webhook {given}: the file cannot be read: {error}") from None
    if not address.startswith(("http://", "https://")):
        raise UserError(
            "--webhook: expected an address, as https://example.org/hook, or @FILE with one in it"
        )
    return address


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    # ``Path.write_text`` and a ``chmod`` after it would leave the text readable for a moment.
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
