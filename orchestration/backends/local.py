"""The plain backend: one trial after the other, in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mar.errors import UserError
from orchestration.backends.base import Listener, Source, Trained
from orchestration.config import LaunchConfig
from orchestration.failures import Reason
from orchestration.storage.trial_dir import ATTEMPTS
from orchestration.studies.trial import Trial
from orchestration.worker.spec import Assignment, assign
from orchestration.worker.trial_runner import train


def run(
    trials: Sequence[Trial], launch: LaunchConfig, listener: Listener, trained: Trained
) -> None:
    """Train (or test) the trials in order; one that fails does not stop the next.

    Raises:
        UserError: more than one worker asked for.
    """
    gpus = _gpus(launch)
    for trial in trials:
        if launch.stop_file.exists() or listener.is_over():
            return
        _one(trial, assign(trial, launch, gpus, trained.get(trial.key)), launch, listener, _never)


def run_search(
    source: Source, launch: LaunchConfig, listener: Listener, announce: Callable[[Trial], None]
) -> None:
    """Train what ``source`` proposes, one after the other; ``announce`` hears of each before it starts.

    Raises:
        UserError: more than one worker asked for.
    """
    gpus = _gpus(launch)
    while (
        not launch.stop_file.exists()
        and not listener.is_over()
        and (trial := source.next()) is not None
    ):
        announce(trial)
        _one(trial, assign(trial, launch, gpus), launch, listener, source.should_end)


def _gpus(launch: LaunchConfig) -> int:
    if launch.workers > 1:
        raise UserError("--local trains with one worker; leave out --local to use --workers")
    return (
        int(torch.cuda.is_available()) if launch.gpus_per_worker is None else launch.gpus_per_worker
    )


def _never(key: str, epoch: int, metrics: dict[str, float]) -> bool:
    return False


class _EndedError(BaseException):
    """A trial is to go no further. Nobody on its way is to take it for a failure."""


def _one(
    trial: Trial,
    assignment: Assignment,
    launch: LaunchConfig,
    listener: Listener,
    should_end: Callable[[str, int, dict[str, float]], bool],
) -> None:
    (Path(assignment.folder) / ATTEMPTS).unlink(missing_ok=True)  # of an earlier launch
    listener.started(trial.key)

    def report(epoch: int, metrics: dict[str, float], _: Path | None) -> None:
        listener.epoch(trial.key, epoch, metrics)
        if should_end(trial.key, epoch, metrics):
            raise _EndedError

    try:
        reason = train(assignment.plain(), report)
    except _EndedError:
        reason = Reason("ended early")
    if reason is None:
        listener.finished(trial.key)
    elif reason.kind != "stopped":
        listener.failed(trial.key, reason)
