"""The backend ``local``: runs one trial after the other, in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from mar.errors import UserError
from mar.training.reports import EpochReport
from orchestration.backends.base import TrainedResults, TrialCallback, TrialSource
from orchestration.config import LaunchConfig
from orchestration.studies.trial import Trial
from orchestration.worker.spec import TrialSpec, build_trial_spec
from orchestration.worker.trial_runner import train

ShouldPrune = Callable[[str, int, Mapping[str, float]], bool]
"""Whether a trial is to end, from its key, the epoch and the epoch's metrics."""


STARTS: str = ""


def session(launch: LaunchConfig) -> AbstractContextManager[None]:
    """Hold nothing: a trial needs this process alone."""
    return nullcontext()


def run(
    trials: Sequence[Trial],
    launch: LaunchConfig,
    callback: TrialCallback,
    trained: TrainedResults,
) -> None:
    """Train (or test) the trials in order; one that fails does not stop the next.

    Raises:
        UserError: more than one worker is asked for.
    """
    gpus = _gpus_per_worker(launch)
    for trial in trials:
        # Checked before each trial: the request may have come while the last one trained.
        if launch.stop_file.exists() or callback.is_over():
            return
        spec = build_trial_spec(trial, launch, gpus, trained.get(trial.key))
        _run_trial(spec, callback, _never)


def run_search(
    source: TrialSource,
    launch: LaunchConfig,
    callback: TrialCallback,
    announce: Callable[[Trial], None],
) -> None:
    """Train what ``source`` proposes, one trial after the other.

    ``announce`` is called with each trial before it starts.

    Raises:
        UserError: more than one worker is asked for.
    """
    gpus = _gpus_per_worker(launch)
    while not launch.stop_file.exists() and not callback.is_over():
        trial = source.next()
        if trial is None:
            return
        # First: the callback looks the trial up by its key.
        announce(trial)
        _run_trial(build_trial_spec(trial, launch, gpus), callback, source.should_prune)


def _gpus_per_worker(launch: LaunchConfig) -> float:
    if launch.worker.workers > 1:
        raise UserError(
            "--backend local trains with one worker; leave out --backend local to use --workers"
        )
    if launch.worker.gpus_per_worker is not None:
        return launch.worker.gpus_per_worker
    # The trial trains in this process, so only one device can be used.
    return int(torch.cuda.is_available())


def _never(key: str, epoch: int, metrics: Mapping[str, float]) -> bool:
    return False


class _PrunedError(BaseException):
    """Ends a training that is pruned.

    It is no ``Exception``, so that the worker, which catches those, does not take it for a failure.
    """


def _run_trial(spec: TrialSpec, callback: TrialCallback, should_prune: ShouldPrune) -> None:
    # The file has the attempts of an earlier launch; this one has its own retries.
    spec.trial_dir.attempts.unlink(missing_ok=True)
    callback.started(spec.key)

    def report(epoch_report: EpochReport) -> None:
        callback.epoch(spec.key, epoch_report)
        if should_prune(spec.key, epoch_report.epoch, epoch_report.metrics):
            # The training calls ``report``, so an exception is the way out of it.
            raise _PrunedError

    try:
        reason = train(spec.to_json(), report)
    except _PrunedError:
        callback.pruned(spec.key)
        return
    if reason is None:
        callback.finished(spec.key)
    elif reason.kind == "stopped":
        callback.stopped(spec.key)
    else:
        callback.failed(spec.key, reason)
