"""Folders that are written whole or not at all, and verified when they are read.

A folder is written beside its place, flushed to the disk, its manifest with every file's SHA-256
last, and then renamed: one that has its name is complete. Imports no torch.
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
"""File name -> what writes that file."""

_FULL_BYTES = 64 * 2**20
"""With less than this left, a failed write is put down to a full disk; torch's own words would not
say so."""
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

    ``advice`` is for a user whose disk refuses.

    When it refuses, ``try_again`` may wait and say whether to write once more.

    Raises:
        Failure: the disk is full or refuses; nothing half-written is left behind.
    """
    while True:
        try:
            _write_atomic_dir(path, writers, metadata)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch reports a full disk as a RuntimeError
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
        for name in (*writers, MANIFEST):
            _flush(unfinished / name)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def read_atomic_dir(path: Path) -> dict[str, Any]:
    """Return the manifest of a folder whose files are what the manifest says.

    Raises:
        Failure: a file is missing or changed, or the manifest is none, or names files elsewhere.
    """
    try:
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
    """Write a file as a whole or not at all.

    A reader sees the old content or the new, never a part.

    It is written beside its path and renamed. The process number is in the temporary name, because
    several processes may write the same file.

    Raises:
        OSError: the disk refuses; the temporary file is removed.
    """
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
