"""Finds pre-trained weights: a file, a folder, or a model on Hugging Face.

Imports neither torch nor Ray.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mar import MANIFEST, RESULT_DIR
from mar.errors import UserError
from mar.safe_input import below, read_json

ABSENT = "absent: "
"""The prefix of a fingerprint of weights that are not on this machine yet, before their name."""
_DIGEST = "sha256: "
_SHIPPED = ("mini", "mar/mini")
"""The names of the model in ``shipped/mini``."""
_FILE_ENDINGS = (".pth", ".pt", ".pyth", ".bin", ".ckpt", ".safetensors", ".tar")
# Only these are downloaded: a repository often has the same weights in several formats. Pickles
# are the second choice, because they can contain code.
_SAFE = ("config.json", "*.safetensors", "*.safetensors.index.json")
_OLD = ("config.json", "pytorch_model.bin")
_HUB = "hub:"
"""The prefix of a name that is never a path: ``hub:owner/name/path/of/file@revision``."""


@dataclass(frozen=True)
class HubName:
    """What a name means on the hub."""

    repository: str
    """``owner/name``."""
    file: str | None = None
    """Path of a file in the repository; None: the weights of its root."""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""

    @classmethod
    def parse(cls, name: str) -> HubName:
        """Return what ``[hub:]owner/name[/file][@revision]`` or a timm model's name means."""
        path, _, revision = name.removeprefix(_HUB).partition("@")
        # A name without an organisation is one of timm's models.
        parts = path.split("/") if "/" in path else ["timm", path]
        return cls("/".join(parts[:2]), "/".join(parts[2:]) or None, revision or None)

    @property
    def text(self) -> str:
        """The name for a message."""
        file = f"/{self.file}" if self.file else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{file}{revision}"


def fetch(name: str) -> Path:
    """Return the file or folder of the weights called ``name``.

    The name is a path; ``organisation/model``, the name of one of timm's models, or
    ``hub:organisation/model/path/of/file``, each with ``@revision`` where another than the main
    branch is meant; or ``mini``, which ships with mar. What is not on this machine is downloaded
    from Hugging Face, or the hub at ``HF_ENDPOINT``; an interrupted download is resumed.

    Raises:
        UserError: there is no such file, or the model cannot be downloaded, or not undamaged.
    """
    found = locate(name)
    if found:
        # What was downloaded before may not have been checked: that process may have ended.
        if not Path(name).expanduser().exists() and name not in _SHIPPED:
            _check_downloads(found, name)
        return found
    hub_name = HubName.parse(name)
    try:
        if hub_name.file:
            path = _file(hub_name)
        else:
            path = _snapshot(hub_name, _SAFE)
            if not any(path.glob("*.safetensors")):
                path = _snapshot(hub_name, _OLD)
    except Exception as error:
        # Errors of huggingface_hub, its HTTP client and a wrong endpoint have no common base.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{name}: no such file here, and the hub gave no {hub_name.text}: {reason}. "
            f"{_by_hand(hub_name)}"
        ) from None
    _check_downloads(path, name)
    return path


def _by_hand(name: HubName) -> str:
    """Return what to do on a machine without a way to the hub."""
    from huggingface_hub import constants

    address = f"{constants.ENDPOINT}/{name.repository}"
    revision = name.revision or "main"
    if name.file:
        what = f"{address}/resolve/{revision}/{name.file}, and give the file's path instead"
    else:
        what = (
            f"config.json and model.safetensors from {address}/tree/{revision} into one folder, "
            "and give the folder's path instead"
        )
    return f"Without a way to it: fetch {what}; or set HF_ENDPOINT to a mirror"


def _check_downloads(path: Path, name: str) -> None:
    """Check downloaded weights against the SHA-256 that the hub gave for each large file.

    Raises:
        UserError: it is another file. It is removed, so that the next try downloads it.
    """
    for file in weight_files(path):
        # The cache has large files under their SHA-256, and a link to it by their name; on a disk
        # without links, and of small files, there is nothing to compare with.
        content = file.resolve()
        if not re.fullmatch(r"[0-9a-f]{64}", content.name):
            continue
        state = content.stat()
        if _sha256(str(content), state.st_size, state.st_mtime_ns) != content.name:
            content.unlink()
            file.unlink(missing_ok=True)
            raise UserError(
                f"{name}: {file.name} was damaged on its way here; run the command again"
            )


def locate(name: str) -> Path | None:
    """Return where the weights are on this machine; None if they must be downloaded first.

    Raises:
        UserError: the name can only be that of a file, and there is none.
    """
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    path = Path(name).expanduser()
    # First: a file or folder of this name is what its owner means.
    if path.exists():
        return path
    if name in _SHIPPED:
        return Path(__file__).parent / "shipped" / "mini"
    is_hub = name.startswith(_HUB)
    # No model's name looks like this: asking the hub would only give a less clear error.
    looks_like_path = (
        path.is_absolute()
        or name.startswith(("./", "../", "~"))
        or path.suffix in _FILE_ENDINGS
        or name.partition("@")[0].count("/") > 1
    )
    if looks_like_path and not is_hub:
        raise UserError(
            f"{name}: no such file or folder of weights; a file in a repository of the hub is "
            f"{_HUB}owner/name/path"
        )
    hub_name = HubName.parse(name)
    try:
        if hub_name.file:
            return _file(hub_name, local_files_only=True)
        folder = _snapshot(hub_name, _SAFE, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    # A ValueError: a path in the repository that leads out of it, or has an empty part.
    except (HFValidationError, ValueError):
        raise UserError(
            f"{name!r} is neither a file, nor a name as organisation/model or "
            f"{_HUB}organisation/model/path/of/file"
        ) from None
    try:
        return folder if _weight_files(folder) else None
    except UserError:
        # A download was interrupted, and a shard is missing: ``fetch`` resumes it.
        return None


def is_path(name: str) -> bool:
    """Whether ``name`` is a file or folder on this machine."""
    return Path(name).expanduser().exists()


def weight_files(path: Path) -> list[Path]:
    """Return the files that contain the weights: the path itself, or files in the folder.

    Safetensors are preferred to a pickle.

    Raises:
        UserError: the folder has none.
    """
    files = [path] if path.is_file() else _weight_files(path)
    if not files:
        advice = ""
        if (path / RESULT_DIR / MANIFEST).is_file():
            advice = f"; the model of this trial is in {path / RESULT_DIR}"
        raise UserError(
            f"{path}: no weights in it (model.safetensors, its shards' index, or "
            f"pytorch_model.bin){advice}"
        )
    return files


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that contain the weights; empty if it has none.

    Raises:
        UserError: the index of shards is damaged, or a shard is missing.
    """
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    old = folder / _OLD[1]
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            shards = sorted({str(shard) for shard in read_json(index)["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not an index of shards") from None
        # The index is a stranger's: ``below`` refuses names that lead out of the folder.
        missing = [shard for shard in shards if not below(folder, shard).is_file()]
        if missing:
            raise UserError(
                f"{folder}: the shard {missing[0]} is missing ({len(missing)} of {len(shards)})"
            )
        return [below(folder, shard) for shard in shards]
    return [old] if old.is_file() else []


def fingerprint(name: str) -> str:
    """Return the fingerprint that stands for the weights in a trial's identity.

    It is the SHA-256 of their content, wherever they are stored. A fingerprint is returned
    unchanged, so that an identity that was read back stays the same.
    """
    if name.startswith((_DIGEST, ABSENT)):
        return name
    try:
        path = locate(name)
    except UserError:
        path = None
    # A plan can be made on a machine that does not have the weights yet.
    if path is None:
        return f"{ABSENT}{name}"
    digests = [
        _sha256(str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for file in weight_files(path)
    ]
    return _DIGEST + hashlib.sha256("".join(digests).encode()).hexdigest()


# Size and time are arguments so that a changed file is read again. All trials of a study usually
# start from the same gigabytes.
@lru_cache(maxsize=64)
def _sha256(file: str, size: int, changed_ns: int) -> str:
    """Return the SHA-256 of a file's content."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _file(name: HubName, local_files_only: bool = False) -> Path:
    """Return the local copy of one file of a repository; downloads it if it is missing."""
    from huggingface_hub import hf_hub_download

    assert name.file
    return Path(
        hf_hub_download(
            name.repository, name.file, revision=name.revision, local_files_only=local_files_only
        )
    )


def _snapshot(name: HubName, patterns: tuple[str, ...], local_files_only: bool = False) -> Path:
    """Return the local folder of a repository's matching files; downloads missing ones."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name.repository,
            revision=name.revision,
            allow_patterns=list(patterns),
            local_files_only=local_files_only,
        )
    )
