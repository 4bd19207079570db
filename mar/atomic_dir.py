"""Folders that are written completely or not at all, and verified when they are read.

A folder is written under a temporary name in the same parent folder. Its manifest, with the SHA-256
of every file, is written last. All files are flushed to the disk, and then the folder is renamed.
So a folder with its final name is complete. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mar import MANIFEST, __version__
from mar.errors import Failure
from mar.safe_input import below, read_json

Writers = Mapping[str, Callable[[Path], None]]
"""File name -> function that writes the file at the path it is given."""

_FULL_BYTES = 64 * 2**20
"""A failed write with fewer bytes free than this is reported as a full disk. PyTorch's own message
does not name the cause."""
_ADVICE = (
    "Earlier checkpoints are kept: make room or choose another --store, and run the same command "
    "again"
)


def write_atomic_dir(
    path: Path,
    writers: Writers,
    metadata: Mapping[str, Any],
    advice: str = _ADVICE,
    try_again: Callable[[Failure], bool] = lambda failure: False,
) -> None:
    """Write a folder of files with a manifest, all or nothing.

    ``advice`` ends the error message: it says what the user can do. After a failed write
    ``try_again`` is called with the failure. It may wait, and returns whether to write once more.

    Raises:
        Failure: the disk is full or the write failed; no incomplete folder is left.
    """
    while True:
        try:
            _write_atomic_dir(path, writers, metadata)
        # torch.save reports a full disk as a RuntimeError, safetensors as its own error.
        except (OSError, RuntimeError, SafetensorError) as error:
            # The folder itself does not exist after a failed write, and may have no parent yet.
            free_bytes = shutil.disk_usage(_existing(path)).free
            if free_bytes < _FULL_BYTES:
                reason = "the disk is full"
            else:
                reason = str(error)
            message = (
                f"could not write {path}: {reason} ({free_bytes / 2**30:.1f} GiB free). {advice}"
            )
            failure = Failure(message, "disk")
        else:
            return
        if not try_again(failure):
            raise failure


def _write_atomic_dir(path: Path, writers: Writers, metadata: Mapping[str, Any]) -> None:
    # In the same parent folder, because a rename is atomic only within one file system. A folder of
    # this name is left by a process that was killed while it wrote.
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for name, write in writers.items():
            write(unfinished / name)
        files = {name: {"sha256": _sha256(unfinished / name)} for name in writers}
        manifest = {**metadata, "files": files, "mar_version": __version__}
        (unfinished / MANIFEST).write_text(
            json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        # Flush before the rename: after a power failure the disk could otherwise have the new name
        # and empty files.
        for name in (*writers, MANIFEST):
            _flush(unfinished / name)
        # POSIX renames a folder only onto an empty one, so an old folder is removed first.
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        # The new name is an entry of the parent folder, which is flushed on its own.
        _flush(path.parent)
    # Also after Ctrl-C and SystemExit: what is incomplete is removed, then the error is raised on.
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def read_atomic_dir(path: Path) -> dict[str, Any]:
    """Return the manifest of a folder, after checking every file against it.

    Raises:
        Failure: a file is missing or changed, or the manifest is missing, is not valid, or names
            files outside of the folder.
    """
    try:
        # A manifest of another origin may be any JSON, so the look-ups below can raise KeyError,
        # TypeError and AttributeError too.
        manifest: dict[str, Any] = read_json(path / MANIFEST)
        changed = [
            name
            for name, metadata in manifest["files"].items()
            if _sha256(below(path, name)) != metadata["sha256"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"it is not complete: {error}") from None
    if changed:
        raise Failure(f"{', '.join(changed)} changed after it was written")
    return manifest


def atomic_write(file: Path, content: bytes) -> None:
    """Write a file completely or not at all.

    A reader sees the old content or the new, never a part: the file is written under a temporary
    name and renamed.

    Raises:
        OSError: the write failed; the temporary file is removed.
    """
    # Several processes may write the same file, so the temporary name has the process number.
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text into a file of an unfinished folder."""
    file.write_text(text, encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    # os.open, because Path.open cannot open a folder.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
