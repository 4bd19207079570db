"""The content of a checkpoint, its atomic save and its verified load.

A checkpoint is a folder ``step_00000123``. It has ``model.safetensors``, ``training.pt`` (the
optimiser's state) and, written last, ``manifest.json`` with the settings, the progress and every
file's SHA-256. The folder is written under another name and then renamed, so a folder of this name
is complete. It has no random state: every draw follows from the seed and the step (``mar.rng``).
A training waits while its state is copied to memory, not while the copy is written to the disk.
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
    """Sums of the epoch so far, over all workers.

    Total, classification and reconstruction loss, number of clips, number of broken videos.
    """
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
    """The state of a training at one moment."""

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
    """Save a training's state below ``folder``; remove the checkpoints that ``keep`` does not keep.

    Returns:
        The folder of the new checkpoint.

    Raises:
        Failure: the disk refuses, and ``try_again`` returns false.
    """
    path = path_for(folder, state.progress)
    writers: Writers = {
        "model.safetensors": lambda file: save_file(dict(state.model), file),
        "training.pt": lambda file: torch.save(state.optimizer, file),
    }
    metadata = {"settings": settings.model_dump(mode="json"), "progress": asdict(state.progress)}
    write_atomic_dir(path, writers, metadata, try_again=try_again)
    present = sorted(folder.glob("step_*"))
    # Newer ones could not be used when this training resumed (``latest``): they must not count
    # among the last ones.
    up_to_this = [each for each in present if each.name <= path.name]
    unfinished = folder.glob(".step_*.unfinished")
    for old in {*present, *unfinished} - keep.of(up_to_this):
        shutil.rmtree(old, ignore_errors=True)
    return path


class Saver:
    """Saves checkpoints in a thread of its own, one at a time.

    The training waits only while its state is copied. A failure to write a checkpoint is raised by
    the next call, or when the block ends. Both callbacks run in the thread: ``stored`` receives
    each checkpoint that is complete; ``try_again`` decides, when the disk refuses one, whether to
    write it again.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrainingConfig,
        keep: RetentionPolicy,
        stored: Callable[[Path], None] = lambda path: None,
        try_again: Callable[[Failure], bool] = lambda failure: False,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.keep = keep
        self.stored = stored
        self.try_again = try_again
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        """Return the saver."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the save that was begun.

        Raises:
            Failure: it could not be written, and no other exception ends the block.
        """
        try:
            if kind is None:
                self.wait()
            else:
                # The exception that ends the block came first, and is the one to report.
                with suppress(Failure):
                    self.wait()
        finally:
            self._thread.shutdown()

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Copy the state and start writing the copy.

        Raises:
            Failure: the checkpoint before this one could not be written.
        """
        # The buffers are in use until the last checkpoint is written.
        self.wait()
        weights = self._copy("model", model.state_dict())
        moments = self._copy("optimizer", optimizer.state_dict())
        copied = Progress(progress.step, [*progress.sums], progress.elapsed_s, [*progress.history])
        # Copies from a GPU run asynchronously: the thread must not write incomplete buffers.
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._pending = self._thread.submit(self._write, State(weights, moments, copied))

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            Failure: it could not be written.
        """
        pending = self._pending
        # A failure is raised once: a later call must not raise it again.
        self._pending = None
        if pending:
            pending.result()

    def _write(self, state: State) -> None:
        path = save(self.folder, self.settings, state, self.keep, self.try_again)
        self.stored(path)

    def _copy(self, name: str, value: Any) -> Any:
        """Copy the tensors of a state to this machine's memory, into the same buffers each time."""
        if isinstance(value, Mapping):
            return {key: self._copy(f"{name}.{key}", each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            copies = (self._copy(f"{name}.{index}", each) for index, each in enumerate(value))
            return type(value)(copies)
        if not isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            # Only into pinned memory does a GPU copy asynchronously.
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(value.detach(), non_blocking=True)


def path_for(folder: Path, progress: Progress) -> Path:
    """Return the path of the checkpoint of a training at this progress."""
    # Eight digits: names sort by step up to 10⁸ steps.
    return folder / f"step_{progress.step:08d}"


def latest(folder: Path, settings: TrainingConfig, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint below ``folder`` that is complete and has these settings.

    Each newer one that is not used is reported to ``say``, with the reason.
    """
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            manifest = read_atomic_dir(path)
            saved = build(manifest["settings"])
            progress = Progress(**manifest["progress"])
        except (Failure, UserError, KeyError, TypeError) as error:
            # It is damaged, or another version of the program wrote it.
            say(f"checkpoint not used: {path}: {error}")
            continue
        # Paths may differ: the data may have moved.
        if without_paths(saved) == without_paths(settings):
            return Checkpoint(path, progress)
        say(f"checkpoint not used: {path} was saved with other settings")
    return None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Load the weights and the optimiser's state; returns the progress from which to resume."""
    model.load_state_dict(load_file(checkpoint.path / "model.safetensors"))
    # ``weights_only``: the file can hold no code that loading would run.
    optimizer_state = torch.load(
        checkpoint.path / "training.pt", weights_only=True, map_location="cpu"
    )
    optimizer.load_state_dict(optimizer_state)
    return checkpoint.progress
