"""What a checkpoint holds; atomic save, verified load.

A checkpoint is a folder ``step_00000123``: ``model.safetensors``, ``training.pt`` (the optimiser's state) and,
written last, ``manifest.json`` with the settings, the progress and every file's SHA-256. It is written beside
its place and then renamed, so a folder with that name is complete. There is no random state in it: every draw
follows from the seed and the step (``mar.dataset``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mar import MANIFEST, __version__
from mar.config import ExperimentConfig
from mar.errors import Failure, UserError
from mar.settings import build, placeless

Writers = Mapping[str, Callable[[Path], None]]
"""File name -> what writes that file."""

_FULL_BYTES = 64 * 2**20
"""With less than this left, a failed write is put down to a full disk; torch's own words would not say so."""


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    """Optimiser steps done."""
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    """Of the epoch so far, over all workers: total, classification and reconstruction loss, clips, broken videos."""
    elapsed_s: float = 0.0
    """Seconds spent training and evaluating, over all attempts."""
    history: list[dict[str, float]] = field(default_factory=list)
    """The metrics of each finished epoch."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    progress: Progress


_ADVICE = "Earlier checkpoints are kept: make room or choose another --store, and run the same command again"


def write_sealed(path: Path, writers: Writers, facts: Mapping[str, Any], advice: str = _ADVICE) -> None:
    """Write a folder of files with a manifest, all or nothing; ``advice`` is for a user whose disk refuses.

    Raises:
        Failure: the disk is full or refuses; nothing half-written is left behind.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for name, write in writers.items():
            write(unfinished / name)
        files = {name: {"sha256": _sha256(unfinished / name)} for name in writers}
        manifest = {**facts, "files": files, "mar_version": __version__}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
        for name in (*writers, MANIFEST):
            _flush(unfinished / name)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        _flush(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(unfinished, ignore_errors=True)
        free_bytes = shutil.disk_usage(_existing(path)).free
        reason = "the disk is full" if free_bytes < _FULL_BYTES else str(error)
        raise Failure(
            f"could not write {path}: {reason} ({free_bytes / 2**30:.1f} GiB free). {advice}", "disk"
        ) from None


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the manifest of a folder whose files are what the manifest says.

    Raises:
        Failure: a file is missing or changed.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        changed = [name for name, facts in manifest["files"].items() if _sha256(path / name) != facts["sha256"]]
    except (OSError, ValueError, KeyError) as error:
        raise Failure(f"it is not complete: {error}") from None
    if changed:
        raise Failure(f"{', '.join(changed)} changed after it was written")
    return manifest


def save(
    folder: Path,
    settings: ExperimentConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep: int = 2,
) -> Path:
    """Save a training's state below ``folder`` and remove all but the newest ``keep`` checkpoints."""
    path = path_for(folder, progress)
    writers: Writers = {
        "model.safetensors": lambda file: save_file(model.state_dict(), file),
        "training.pt": lambda file: torch.save(optimizer.state_dict(), file),
    }
    write_sealed(path, writers, {"settings": settings.model_dump(mode="json"), "progress": asdict(progress)})
    there = sorted(folder.glob("step_*"))
    kept = [old for old in there if old.name <= path.name][-keep:]
    for old in {*there, *folder.glob(".step_*.unfinished")} - {*kept}:  # newer ones were found to be damaged
        shutil.rmtree(old, ignore_errors=True)
    return path


def path_for(folder: Path, progress: Progress) -> Path:
    """Return where a checkpoint of this progress belongs."""
    return folder / f"step_{progress.step:08d}"


def latest(folder: Path, settings: ExperimentConfig, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint below ``folder`` that is whole and has these settings; tell of others."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            manifest = read_sealed(path)
            saved, progress = build(manifest["settings"]), Progress(**manifest["progress"])
        except (Failure, UserError, KeyError, TypeError) as error:  # damaged, or of another version
            say(f"checkpoint not used: {path}: {error}")
            continue
        if placeless(saved) == placeless(settings):
            return Checkpoint(path, progress)
        say(f"checkpoint not used: {path} has other settings")
    return None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Load weights and optimiser state; returns the progress to go on from."""
    model.load_state_dict(load_file(checkpoint.path / "model.safetensors"))
    optimizer.load_state_dict(torch.load(checkpoint.path / "training.pt", weights_only=True, map_location="cpu"))
    return checkpoint.progress


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text."""
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
