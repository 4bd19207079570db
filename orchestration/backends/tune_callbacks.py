"""What Ray Tune calls during a launch: a searcher, a scheduler and a callback.

Ray's classes are subclassed inside functions, because Ray reads variables of the environment when
it is imported. Tune pickles these objects, and their classes with what their methods refer to, for
snapshots that are not used. So what cannot be pickled is a member, and members are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mar.errors import Failure
from orchestration.backends.base import TrialCallback, TrialSource, reports_in
from orchestration.failures import FailureReason, reason_in_report
from orchestration.storage.object_store import open_object_store
from orchestration.storage.trial_dir import TrialDir
from orchestration.storage.trial_sync import fetch_trial_dir
from orchestration.worker.spec import TrialSpec


@dataclass
class TrialEnds:
    """How trials ended that neither finished nor failed."""

    pruned: set[str] = field(default_factory=set[str])
    """Keys of the trials that the scheduler ended."""
    crowded: set[str] = field(default_factory=set[str])
    """Keys of the trials that ran out of a shared GPU's memory, and are to be started again."""


def make_searcher(next_config: Callable[[], dict[str, Any] | None]) -> Any:
    """Return a searcher of Tune's that proposes the next trial.

    It has no state of its own: MLflow and Optuna's storage know which trials there were.
    """
    from ray.tune.search import Searcher

    class TrialSearcher(Searcher):
        def __init__(self, next_config: Callable[[], dict[str, Any] | None]) -> None:
            super().__init__(metric="epoch", mode="max")
            self.next_config = next_config

        def __getstate__(self) -> dict[str, Any]:
            """Leave threads and storage out: Tune pickles this for a snapshot that is not used."""
            return {}

        def suggest(self, trial_id: str) -> Any:
            return self.next_config() or Searcher.FINISHED

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """Do nothing: ``TuneCallback`` reports how a trial ended."""

        def save(self, checkpoint_path: str) -> None:
            """Do nothing: it has no state."""

        def restore(self, checkpoint_path: str) -> None:
            """Do nothing: it has no state."""

    return TrialSearcher(next_config)


def make_scheduler(source: TrialSource, ends: TrialEnds) -> Any:
    """Return a scheduler of Tune's that ends a trial when ``source`` prunes it.

    It adds the trial's key to ``ends``.
    """
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class PruningScheduler(FIFOScheduler):
        def __init__(self, source: TrialSource) -> None:
            super().__init__()
            self.source = source

        def __getstate__(self) -> dict[str, Any]:
            """Leave the source out: it has Optuna's storage."""
            return {}

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            key = key_of(trial)
            # A resumed trial reports its earlier epochs again: the source must see each of them.
            for report in reports_in(result):
                if self.source.should_prune(key, report.epoch, report.metrics):
                    ends.pruned.add(key)
                    return TrialScheduler.STOP
            return TrialScheduler.CONTINUE

    return PruningScheduler(source)


def spec_of(trial: Any) -> Mapping[str, Any]:
    """Return the spec of one of Tune's trials, as JSON."""
    spec: Mapping[str, Any] = trial.config["spec"]
    return spec


def key_of(trial: Any) -> str:
    """Return the key of one of Tune's trials."""
    return str(spec_of(trial)["key"])


def _trial_dir_of(trial: Any) -> TrialDir:
    """Return a trial's folder.

    With an object store, what a worker on another node left in it is downloaded first.
    """
    spec = TrialSpec.from_json(spec_of(trial))
    if spec.worker.object_store:
        # If the download fails, the folder has no result, and the trial is reported as failed.
        with suppress(Failure, OSError):
            store = open_object_store(spec.worker.object_store)
            fetch_trial_dir(store, spec.key, spec.trial_dir)
    return spec.trial_dir


def _was_stopped(trial: Any, reason: FailureReason | None) -> bool:
    """Whether the study was asked to stop: then the trial is neither finished nor failed."""
    stop_file = TrialSpec.from_json(spec_of(trial)).stop_file
    if reason is not None and reason.kind == "stopped":
        # The request may have been made on another machine: repeat it on this disk, where
        # ``next_config`` looks before it starts another trial.
        stop_file.parent.mkdir(parents=True, exist_ok=True)
        stop_file.touch()
    return stop_file.exists()


def make_callback(callback: TrialCallback, ends: TrialEnds) -> Any:
    """Return a callback of Tune's that passes trials' events on to ``callback``.

    Tune calls it in the launch's own process.
    """
    from ray import tune

    class TuneCallback(tune.Callback):
        def __init__(self, callback: TrialCallback | None) -> None:
            self.callback = callback

        def __getstate__(self) -> dict[str, Any]:
            """Leave the callback out: it has threads."""
            return {"callback": None}

        def on_trial_start(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            if self.callback:
                self.callback.started(key_of(trial))

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            if self.callback:
                for report in reports_in(result):
                    self.callback.epoch(key_of(trial), report)

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            trial_dir = _trial_dir_of(trial)
            if self.callback:
                _report_end(self.callback, ends, trial, _reason_of_end(trial, trial_dir))

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            trial_dir = _trial_dir_of(trial)
            if self.callback:
                _report_end(self.callback, ends, trial, _reason_of_error(trial, trial_dir))

    return TuneCallback(callback)


def _reason_of_end(trial: Any, trial_dir: TrialDir) -> FailureReason:
    """Return why a trial failed whose process ended in order, if it did fail."""
    # On a full disk the reason is in the last report and in no file.
    reason = reason_in_report(trial.last_result or {}) or trial_dir.read_failure()
    return reason or FailureReason("it ended without a result")


def _reason_of_error(trial: Any, trial_dir: TrialDir) -> FailureReason:
    """Return why a trial failed whose process was lost, or raised an error."""
    error: object = "Ray lost the trial"
    if hasattr(trial, "get_error"):
        error = trial.get_error()
    return trial_dir.read_failure(error) or FailureReason("Ray lost the trial", "worker_lost")


def _report_end(
    callback: TrialCallback, ends: TrialEnds, trial: Any, reason: FailureReason
) -> None:
    """Report how a trial ended.

    It failed for ``reason`` only if it was not pruned, has no result, was not stopped, and is not
    to be started again with a larger share of a GPU.
    """
    spec = TrialSpec.from_json(spec_of(trial))
    # First: a pruned trial may have had a result before it was stopped.
    if spec.key in ends.pruned:
        callback.pruned(spec.key)
    # Its process may have been lost after it wrote its result.
    elif spec.trial_dir.is_finished:
        callback.finished(spec.key)
    elif _was_stopped(trial, reason):
        callback.stopped(spec.key)
    elif reason.kind == "memory" and not spec.divides_batch:
        ends.crowded.add(spec.key)
        callback.waits(spec.key)
    else:
        callback.failed(spec.key, reason)
