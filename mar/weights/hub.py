"""Where pre-trained weights come from: a file, a folder, or a name on Hugging Face.

Imports neither torch nor Ray.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from mar.errors import UserError
from mar.safe_input import below, read_json

ABSENT = "absent: "
"""A fingerprint that begins so is of weights that are not on this machine yet; their name
follows."""
_DIGEST = "sha256: "
_FILE_ENDINGS = (".pth", ".pt", ".pyth", ".bin", ".ckpt", ".safetensors", ".tar")
_SAFE = ("config.json", "*.safetensors", "*.safetensors.index.json")
_OLD = ("config.json", "pytorch_model.bin")


def fetch(name: str) -> Path:
    """Return the file or folder that ``name`` means.

    A path, ``organisation/model``, or the name of one of timm's models.

    What is not on this machine is downloaded from Hugging Face, where timm's models stand under
    ``timm/``.

    Raises:
        UserError: there is no such file, or no such model can be had.
    """
    found = locate(name)
    if found:
        return found
    repository = _repository(name)
    try:
        folder = _snapshot(repository, _SAFE)
        if any(folder.glob("*.safetensors")):
            return folder
        return _snapshot(repository, _OLD)
    except Exception as error:  # the hub's own errors, its HTTP client's, and a misspelt endpoint's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}: no such file here, and Hugging Face gave no {repository}: {reason}"
        ) from None


def locate(name: str) -> Path | None:
    """Return where the weights are on this machine; none: they would have to be downloaded.

    Raises:
        UserError: it can only be a file, and there is none.
    """
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    path = Path(name).expanduser()
    if path.exists():
        return path
    if (
        path.is_absolute()
        or name.startswith(("./", "../", "~"))
        or path.suffix in _FILE_ENDINGS
        or name.count("/") > 1
    ):
        raise UserError(f"{name}: no such file or folder of weights")
    try:
        folder = _snapshot(_repository(name), _SAFE, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    except HFValidationError:
        raise UserError(f"{name!r} is neither a file, nor a name as organisation/model") from None
    try:
        return folder if _weight_files(folder) else None
    except UserError:  # a download that was cut short: it goes on
        return None


def is_path(name: str) -> bool:
    """Whether ``name`` is a file or folder here, rather than a model's name."""
    return Path(name).expanduser().exists()


def weight_files(path: Path) -> list[Path]:
    """Return the files that contain the weights.

    The path itself, or files of a folder, safetensors first.

    Raises:
        UserError: the folder has none.
    """
    files = [path] if path.is_file() else _weight_files(path)
    if not files:
        raise UserError(
            f"{path}: no weights in it (model.safetensors, its shards' index, or pytorch_model.bin)"
        )
    return files


def _weight_files(folder: Path) -> list[Path]:
    single, index, old = (
        folder / name for name in ("model.safetensors", "model.safetensors.index.json", _OLD[1])
    )
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            shards = sorted({str(shard) for shard in read_json(index)["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not an index of shards") from None
        missing = [shard for shard in shards if not below(folder, shard).is_file()]
        if missing:
            raise UserError(
                f"{folder}: the shard {missing[0]} is missing ({len(missing)} of {len(shards)})"
            )
        return [below(folder, shard) for shard in shards]
    return [old] if old.is_file() else []


def fingerprint(name: str) -> str:
    """Return the fingerprint of the weights in a trial's identity.

    The SHA-256 of their content, wherever they are stored.

    A fingerprint is returned as it is, so that an identity read back gives itself.
    """
    if name.startswith((_DIGEST, ABSENT)):
        return name
    try:
        path = locate(name)
    except UserError:
        path = None
    if path is None:
        return f"{ABSENT}{name}"
    digests = [
        _sha256(str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for file in weight_files(path)
    ]
    return _DIGEST + hashlib.sha256("".join(digests).encode()).hexdigest()


@lru_cache(maxsize=64)
def _sha256(file: str, size: int, changed_ns: int) -> str:
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _repository(name: str) -> str:
    return name if "/" in name else f"timm/{name}"


def _snapshot(repository: str, patterns: tuple[str, ...], local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repository, allow_patterns=list(patterns), local_files_only=local_files_only
        )
    )
