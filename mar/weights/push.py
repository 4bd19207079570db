"""Uploads a folder of weights to a hub: Hugging Face's, or the one that ``HF_ENDPOINT`` names."""

from __future__ import annotations

from pathlib import Path

from mar.errors import Failure, UserError
from mar.safe_text import printable


def check_target(name: str) -> None:
    """Raise a UserError unless a name is ``OWNER/NAME`` and a token is at hand."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name}: {error}") from None
    if name.count("/") != 1:
        raise UserError(f"{name}: expected OWNER/NAME")
    if not get_token():
        raise UserError("no token for the hub: set HF_TOKEN, or log in with hf auth login")


def hub_address() -> str:
    """Return the hub's address."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def push(folder: Path, name: str, is_public: bool) -> str:
    """Upload a folder as one commit, and make the repository if there is none; return its address.

    A repository that exists keeps its visibility.

    Raises:
        Failure: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    # One line of ours says what was sent.
    disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(name, private=not is_public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Weights, settings and model card"
        )
    # Errors of huggingface_hub, its HTTP client and a wrong endpoint have no common base.
    except Exception as error:
        reason = printable(
            str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        )
        raise Failure(f"{hub_address()} did not take {name}: {reason}") from None
    return str(commit.commit_url)


def listing(folder: Path) -> list[tuple[str, int]]:
    """Return the names and sizes in bytes of a folder's files."""
    return sorted((each.name, each.stat().st_size) for each in folder.iterdir())
