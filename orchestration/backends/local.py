"""The plain backend: one trial after the other, in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mar.errors import UserError
from orchestration.backends.base import TrainedResults, TrialCallback, TrialSource
from orchestration.config import LaunchConfig
from orchestration.failures import FailureReason
from orchestration.storage.trial_dir import ATTEMPTS
from orchestration.studies.trial import Trial
from orchestration.worker.spec import TrialSpec, build_trial_spec
from orchestration.worker.trial_runner import train


def run(
    trials: Sequence[Trial], launch: LaunchConfig, callback: TrialCallback, trained: TrainedResults
) -> None:
    """Train (or test) the trials in order; one that fails does not stop the next.

    Raises:
        UserError: more than one worker asked for.
    """
    gpus = _gpus(launch)
    for trial in trials:
        if launch.stop_file.exists() or callback.is_over():
            return
        _one(
            trial,
            build_trial_spec(trial, launch, gpus, trained.get(trial.key)),
            launch,
            callback,
            _never,
        )


def run_search(
    source: TrialSource,
    launch: LaunchConfig,
    callback: TrialCallback,
    announce: Callable[[Trial], None],
) -> None:
    """Train what ``source`` proposes, one after the other; ``announce`` hears of each before it starts.

    Raises:
        UserError: more than one worker asked for.
    """
    gpus = _gpus(launch)
    while (
        not launch.stop_file.exists()
        and not callback.is_over()
        and (trial := source.next()) is not None
    ):
        announce(trial)
        _one(trial, build_trial_spec(trial, launch, gpus), launch, callback, source.should_prune)


def _gpus(launch: LaunchConfig) -> int:
    if launch.workers > 1:
        raise UserError("--local trains with one worker; leave out --local to use --workers")
    return (
        int(torch.cuda.is_available()) if launch.gpus_per_worker is None else launch.gpus_per_worker
    )


def _never(key: str, epoch: int, metrics: dict[str, float]) -> bool:
    return False


class _PrunedError(BaseException):
    """A trial is to go no further. Nobody on its way is to take it for a failure."""


def _one(
    trial: Trial,
    assignment: TrialSpec,
    launch: LaunchConfig,
    callback: TrialCallback,
    should_prune: Callable[[str, int, dict[str, float]], bool],
) -> None:
    (Path(assignment.folder) / ATTEMPTS).unlink(missing_ok=True)  # of an earlier launch
    callback.started(trial.key)

    def report(epoch: int, metrics: dict[str, float], _: Path | None) -> None:
        callback.epoch(trial.key, epoch, metrics)
        if should_prune(trial.key, epoch, metrics):
            raise _PrunedError

    try:
        reason = train(assignment.plain(), report)
    except _PrunedError:
        reason = FailureReason("ended early")
    if reason is None:
        callback.finished(trial.key)
    elif reason.kind != "stopped":
        callback.failed(trial.key, reason)
