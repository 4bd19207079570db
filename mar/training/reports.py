"""What a training reports, and what it asks: the only ways in which it talks to what runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from mar.errors import Failure


class TrainingSignal(IntEnum):
    """What a training is to do after a step.

    Of the answers of several workers the highest counts.
    """

    CONTINUE = 0
    CHECKPOINT = 1
    """Save now: the machine may go away."""
    STOP = 2
    """Save, then stop."""
    ABORT = 3
    """Stop without saving: the trial will not be resumed."""


@dataclass(frozen=True)
class EpochReport:
    """The metrics of one epoch, or of the test after the last."""

    epoch: int
    """Finished epochs."""
    metrics: Mapping[str, float]
    is_replay: bool = False
    """Reported once before, by an attempt that this one resumes: who reads reports may have lost
    that one."""
    is_final: bool = False
    """After the test; ``epoch`` is the last epoch again, ``metrics`` has what the test measured
    too."""


@dataclass(frozen=True)
class TrainingCallbacks:
    """What a training calls; the defaults print and never stop it.

    Every worker of a data-parallel training calls ``report`` and ``on_step`` equally often, in the
    same order.
    """

    report: Callable[[EpochReport], None] = lambda report: None
    """Receives each epoch's report as the epoch ends."""
    log: Callable[[str], None] = print
    """Receives messages for a person."""
    on_step: Callable[[int, int], TrainingSignal] = lambda done, total: TrainingSignal.CONTINUE
    """Called after each step with the steps done and their total. All workers must get the same
    answer."""
    heartbeat: Callable[[], None] = lambda: None
    """Called for each batch that is tested: the training is alive."""
    on_checkpoint: Callable[[Path], None] = lambda path: None
    """Called with each checkpoint that is complete on the disk, in the thread that wrote it."""
    on_write_error: Callable[[Failure], bool] = lambda failure: False
    """Called when the disk refuses a checkpoint or the result. True: try again; it may wait for
    room first."""
