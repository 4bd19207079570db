"""What a checkpoint holds; atomic save, verified load.

A checkpoint is a folder ``step_00000123``: ``model.safetensors``, ``training.pt`` (the optimiser's
state) and, written last, ``manifest.json`` with the settings, the progress and every file's
SHA-256. It is written beside its place and then renamed, so a folder with that name is complete.
There is no random state in it: every draw follows from the seed and the step (``mar.dataset``). A
training waits while its state is copied, not while that is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mar.atomic_dir import Writers, read_atomic_dir, write_atomic_dir
from mar.config.overrides import build, without_paths
from mar.config.schema import TrainingConfig
from mar.errors import Failure, UserError
from mar.training.retention import RetentionPolicy


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    """Optimiser steps done."""
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    """Of the epoch so far, over all workers: total, classification and reconstruction loss, clips,
    broken videos."""
    elapsed_s: float = 0.0
    """Seconds spent training and evaluating, over all attempts."""
    history: list[dict[str, float]] = field(default_factory=list)
    """The metrics of each finished epoch."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    progress: Progress


class State(NamedTuple):
    """What a training is made of, at one moment."""

    model: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    progress: Progress


def save(
    folder: Path,
    settings: TrainingConfig,
    state: State,
    keep: RetentionPolicy,
    try_again: Callable[[Failure], bool] = lambda failure: False,
) -> Path:
    """Save a training's state below ``folder``; remove the checkpoints that ``keep`` drops."""
    path = path_for(folder, state.progress)
    writers: Writers = {
        "model.safetensors": lambda file: save_file(dict(state.model), file),
        "training.pt": lambda file: torch.save(state.optimizer, file),
    }
    metadata = {"settings": settings.model_dump(mode="json"), "progress": asdict(state.progress)}
    write_atomic_dir(path, writers, metadata, try_again=try_again)
    there = sorted(folder.glob("step_*"))
    older = [
        each for each in there if each.name <= path.name
    ]  # newer ones were found to be damaged
    for old in {*there, *folder.glob(".step_*.unfinished")} - keep.of(older):
        shutil.rmtree(old, ignore_errors=True)
    return path


class Saver:
    """Saves checkpoints in a thread of its own, one at a time.

    The training waits while its state is copied.

    What kept a checkpoint from being written is raised by the call after it, or on leaving.
    ``stored`` is told of each that is whole, in that thread; there ``try_again`` is asked when the
    disk refuses one.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrainingConfig,
        keep: RetentionPolicy,
        stored: Callable[[Path], None] = lambda path: None,
        try_again: Callable[[Failure], bool] = lambda failure: False,
    ) -> None:
        self.folder, self.settings, self.keep = folder, settings, keep
        self.stored, self.try_again = stored, try_again
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish what was begun."""
        try:
            with suppress(
                *(() if kind is None else (Failure,))
            ):  # the first failure is the one to tell of
                self.wait()
        finally:
            self._thread.shutdown()

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Copy the state, and have it written.

        Raises:
            Failure: the checkpoint before this one could not be written.
        """
        self.wait()
        weights, moments = (
            self._copy("model", model.state_dict()),
            self._copy("optimizer", optimizer.state_dict()),
        )
        copied = Progress(progress.step, [*progress.sums], progress.elapsed_s, [*progress.history])
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the copies are under way
        self._pending = self._thread.submit(self._write, State(weights, moments, copied))

    def wait(self) -> None:
        """Return when all that was to be saved is on the disk.

        Raises:
            Failure: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _write(self, state: State) -> None:
        self.stored(save(self.folder, self.settings, state, self.keep, self.try_again))

    def _copy(self, name: str, value: Any) -> Any:
        """Copy the tensors of a state to this machine's memory, into the same buffers each time."""
        if isinstance(value, Mapping):
            return {key: self._copy(f"{name}.{key}", each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(
                self._copy(f"{name}.{index}", each) for index, each in enumerate(value)
            )
        if not isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(value.detach(), non_blocking=True)


def path_for(folder: Path, progress: Progress) -> Path:
    """Return where a checkpoint of this progress belongs."""
    return folder / f"step_{progress.step:08d}"


def latest(folder: Path, settings: TrainingConfig, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint below ``folder`` that is whole and has these settings.

    Tell of others.
    """
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            manifest = read_atomic_dir(path)
            saved, progress = build(manifest["settings"]), Progress(**manifest["progress"])
        except (Failure, UserError, KeyError, TypeError) as error:  # damaged, or of another version
            say(f"checkpoint not used: {path}: {error}")
            continue
        if without_paths(saved) == without_paths(settings):
            return Checkpoint(path, progress)
        say(f"checkpoint not used: {path} has other settings")
    return None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Load weights and optimiser state; returns the progress to go on from."""
    model.load_state_dict(load_file(checkpoint.path / "model.safetensors"))
    optimizer.load_state_dict(
        torch.load(checkpoint.path / "training.pt", weights_only=True, map_location="cpu")
    )
    return checkpoint.progress
