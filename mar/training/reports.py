"""The interface between a training and its caller: reports, callbacks and signals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from mar.errors import Failure


class TrainingSignal(IntEnum):
    """The instruction to a training after a step.

    If several workers get different signals, the highest one applies to all of them.
    """

    # The order is by urgency, so that the highest of several is the one to follow.

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
    """Whether an earlier attempt has reported this epoch; that report may have been lost."""
    is_final: bool = False
    """Whether this is the report after the test: ``epoch`` is the last epoch again, and ``metrics``
    also has the test's."""


@dataclass(frozen=True)
class TrainingCallbacks:
    """The functions that a training calls; the defaults print messages and never stop it.

    Every worker of a data-parallel training calls ``report`` and ``on_step`` equally often, in the
    same order.
    """

    # Ray and MLflow reach a training through these functions alone; mar.training imports neither.
    report: Callable[[EpochReport], None] = lambda report: None
    """Receives each epoch's report as the epoch ends."""
    log: Callable[[str], None] = print
    """Receives messages for a person."""
    # Workers that act on different answers would wait for each other in the next collective call.
    while_preparing: Callable[[], None] = lambda: None
    """Called while a training waits or computes before its first step; may raise ``Stopped``."""
    on_step: Callable[[int, int], TrainingSignal] = lambda done, total: TrainingSignal.CONTINUE
    """Called after each step with the steps done and their total. All workers must get the same
    answer."""
    heartbeat: Callable[[], None] = lambda: None
    """Called for each batch of an evaluation, to show that the training is alive."""
    on_checkpoint: Callable[[Path], None] = lambda path: None
    """Called with each checkpoint that is complete on the disk, in the thread that wrote it."""
    on_write_error: Callable[[Failure], bool] = lambda failure: False
    """Called when the disk refuses a checkpoint or the result; returns whether to try again. It may
    wait for free space first."""
