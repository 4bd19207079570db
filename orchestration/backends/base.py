"""The protocols between a launch and a backend: the trials it gets, and the events it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from mar.training.reports import EpochReport
from orchestration.config import LaunchConfig
from orchestration.failures import FailureReason
from orchestration.studies.trial import Trial

TrainedResults = Mapping[str, Path]
"""Trials that are only to be tested: key -> the result folder of the training they use."""


class TrialSource(Protocol):
    """Proposes trials one by one; ``OptunaSearch`` is one."""

    def next(self) -> Trial | None:
        """Return the next trial to train, or none when there are enough."""
        ...

    def should_prune(self, key: str, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Whether a trial is to end at this epoch."""
        ...


class TrialCallback(Protocol):
    """Receives a trial's events, in the launch's own process.

    Every trial that a backend starts has ``started`` first and one of ``finished``, ``failed``,
    ``pruned`` and ``stopped`` last.
    """

    def started(self, key: str) -> None:
        """Called when a trial runs; again if its process was lost and started again."""

    def epoch(self, key: str, report: EpochReport) -> None:
        """Called when a trial reports an epoch.

        A resumed trial reports its earlier epochs again, with ``is_replay``.
        """

    def waits(self, key: str) -> None:
        """Called when a trial has ended and is to be started again, with more of a GPU."""

    def finished(self, key: str) -> None:
        """Called when a trial has a complete result folder."""

    def failed(self, key: str, reason: FailureReason) -> None:
        """Called when a trial failed permanently."""

    def pruned(self, key: str) -> None:
        """Called when the trial source ended a trial: others were better at the same epoch."""

    def stopped(self, key: str) -> None:
        """Called when a trial saved and stopped, because the study is to stop."""

    def is_over(self) -> bool:
        """Whether no other trial is to start."""
        ...


class Backend(Protocol):
    """Where trials run: a module with these functions, as ``local`` and ``ray_tune``."""

    STARTS: str
    """What the user waits for before the first trial; empty if for nothing."""

    def session(self, launch: LaunchConfig) -> AbstractContextManager[None]:
        """Hold what several studies of one launch share, as Ray, which starts once for all."""
        ...

    def run(
        self,
        trials: Sequence[Trial],
        launch: LaunchConfig,
        callback: TrialCallback,
        trained: TrainedResults,
    ) -> None:
        """Train (or test) the trials; return when each is finished or failed permanently."""
        ...

    def run_search(
        self,
        source: TrialSource,
        launch: LaunchConfig,
        callback: TrialCallback,
        announce: Callable[[Trial], None],
    ) -> None:
        """Train what ``source`` proposes; ``announce`` gets each trial before it starts."""
        ...


REPLAYED_EPOCHS = "replayed_epochs"
"""Key in a report to Ray: the epochs before the checkpoint from which the trial was resumed."""


def report_with_replay(send: Callable[[dict[str, Any]], None]) -> Callable[[EpochReport], None]:
    """Return a callback that sends each epoch to Ray as it ends.

    Replayed epochs are sent along with the first new one.

    Each Ray report blocks until the next poll, so a hundred replayed epochs one by one would take a
    minute.
    """
    replayed: list[dict[str, Any]] = []

    def report(epoch_report: EpochReport) -> None:
        if epoch_report.is_replay:
            # Another attempt in this process replays from the start again.
            if epoch_report.epoch == 1:
                replayed.clear()
            replayed.append(_to_ray(epoch_report))
            return
        # A copy of the list: in one process Ray may keep the object, and the next line empties it.
        send({**_to_ray(epoch_report), REPLAYED_EPOCHS: [*replayed]})
        replayed.clear()

    return report


def reports_in(result: Mapping[str, Any]) -> Sequence[EpochReport]:
    """Return the epochs in a report that Ray delivered, the replayed ones first.

    A report without metrics yields none: the reason of a failure, for example.
    """
    reports = [_from_ray(values, is_replay=True) for values in result.get(REPLAYED_EPOCHS, [])]
    if "epoch" in result:
        reports.append(_from_ray(result, is_replay=False))
    return [report for report in reports if report.metrics]


def _to_ray(report: EpochReport) -> dict[str, Any]:
    return {**report.metrics, "epoch": report.epoch, "is_final": report.is_final}


def _from_ray(values: Mapping[str, Any], is_replay: bool) -> EpochReport:
    # The metrics of a training have a slash in their names. Ray adds entries of its own, and gives
    # schedulers the trial's configuration too, with names like "config/spec/key".
    metrics: dict[str, float] = {}
    for name, value in values.items():
        if "/" in name and not name.startswith("config/"):
            metrics[name] = float(value)
    return EpochReport(int(values["epoch"]), metrics, is_replay, bool(values.get("is_final")))
