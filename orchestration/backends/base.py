"""One trial: what a backend is told about it, and Tune's trial that trains it in its own process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from orchestration.failures import FailureReason
from orchestration.studies.trial import Trial

TrainedResults = Mapping[str, Path]
"""Trials that are to be tested, not trained: key -> the result folder of their training."""


class TrialSource(Protocol):
    """What proposes trials one by one; ``search.Proposer`` does."""

    def next(self) -> Trial | None:
        """Return the next trial to train; none: there are enough."""
        ...

    def should_prune(self, key: str, epoch: int, metrics: dict[str, float]) -> bool:
        """Whether a trial is to be ended at this epoch."""
        ...


class TrialCallback(Protocol):
    """What a launch wants to hear from the backend that trains its trials."""

    def started(self, key: str) -> None:
        """A trial runs."""

    def epoch(self, key: str, epoch: int, metrics: dict[str, float]) -> None:
        """A trial finished an epoch (or tells of an earlier one again)."""

    def finished(self, key: str) -> None:
        """A trial is done: its result folder is complete."""

    def failed(self, key: str, reason: FailureReason) -> None:
        """A trial was given up."""

    def is_over(self) -> bool:
        """Whether no other trial is to begin."""
        ...


REPLAYED_EPOCHS = "earlier"
"""In a report to Ray: what was reported before this trial went on from a checkpoint, an epoch each."""


def report_with_replay(
    send: Callable[[dict[str, Any]], None],
) -> Callable[[int, dict[str, float], Path | None], None]:
    """Return a report function that sends each epoch as it ends, and those of earlier attempts along with the first.

    Ray answers a report when it next looks, so a hundred of them in a row would take a minute.
    """
    replayed: list[dict[str, Any]] = []

    def report(epoch: int, metrics: dict[str, float], checkpoint: Path | None) -> None:
        if checkpoint is None:
            if epoch == 1:  # another attempt
                replayed.clear()
            replayed.append({**metrics, "epoch": epoch})
        else:
            send({**metrics, "epoch": epoch, REPLAYED_EPOCHS: [*replayed]})
            replayed.clear()

    return report
