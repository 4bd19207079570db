"""Runs trials with Ray Tune, concurrently as resources allow.

The trials are a fixed, ordered list, or what a search proposes.

Nothing is restored from Tune's own snapshots: finished trials are in MLflow, unfinished ones in
their own checkpoints, and both are found by the trial's settings. So a launch that died is simply
started again, and no pickle of an earlier launch is ever read.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from mar.errors import Failure, UserError, notice
from orchestration.backends.base import TrainedResults, TrialCallback, TrialSource, reports_in
from orchestration.backends.gpu_sharing import (
    Share,
    larger_share,
    max_concurrent_trials,
    share_of,
)
from orchestration.backends.ray_env import ray_environment
from orchestration.backends.ray_session import ray_session
from orchestration.config import LaunchConfig
from orchestration.failures import FailureReason, reason_in_report
from orchestration.storage.object_store import open_object_store
from orchestration.storage.trial_dir import TrialDir
from orchestration.storage.trial_sync import fetch_trial_dir
from orchestration.studies.trial import Trial
from orchestration.worker.spec import TrialSpec, build_trial_spec

STARTS: str = "starting Ray and its workers: some 10 to 20 s"


def session(launch: LaunchConfig) -> AbstractContextManager[None]:
    """Hold Ray, started or joined once for all studies of a launch."""
    return ray_session(launch)


def run(
    trials: Sequence[Trial],
    launch: LaunchConfig,
    callback: TrialCallback,
    trained: TrainedResults,
) -> None:
    """Train (or test) the trials; returns when each is finished or failed permanently.

    Raises:
        UserError: one trial asks for more than the cluster has.
    """
    if launch.backend == "inline" and launch.worker.workers > 1:
        # An inline trial is one process of Tune's: it has no group of workers.
        raise UserError("--backend inline trains with one worker; leave it out to use --workers")
    waiting = iter(trials)
    _run_with_shares(lambda: next(waiting, None), None, launch, callback, trained, trials)


def run_search(
    source: TrialSource,
    launch: LaunchConfig,
    callback: TrialCallback,
    announce: Callable[[Trial], None],
) -> None:
    """Train what ``source`` proposes, concurrently as resources allow.

    ``announce`` is called with each trial before it starts.

    Raises:
        UserError: one trial asks for more than the cluster has.
    """

    def next_announced() -> Trial | None:
        trial = source.next()
        if trial:
            announce(trial)
        return trial

    _run_with_shares(next_announced, source, launch, callback, {}, [])


def _run_with_shares(
    next_trial: Callable[[], Trial | None],
    source: TrialSource | None,
    launch: LaunchConfig,
    callback: TrialCallback,
    trained: TrainedResults,
    known: Sequence[Trial],
) -> None:
    """Run the trials; those that ran out of a shared GPU's memory again, with twice the share.

    ``known`` are the trials to come, as far as they are known.
    """
    # Before the import: Ray reads some of these variables when it is imported.
    os.environ.update(ray_environment(launch))
    with ray_session(launch):
        share = share_of(launch, known)
        if share.message:
            notice(share.message)
        waiting: list[Trial] = []

        def next_waiting() -> Trial | None:
            return waiting.pop(0) if waiting else next_trial()

        while True:
            waiting = _run(next_waiting, source, launch, share, callback, trained)
            if not waiting:
                return
            share = larger_share(launch, share)
            names = ", ".join(trial.name for trial in waiting)
            if share.divides_batch and share.gpus < 1:
                notice(
                    f"no room on a GPU, and no larger share to be had: smaller steps for {names}"
                )
            else:
                notice(f"no room beside others on a GPU: {share.gpus:g} of one each for {names}")


def _run(
    next_trial: Callable[[], Trial | None],
    source: TrialSource | None,
    launch: LaunchConfig,
    share: Share,
    callback: TrialCallback,
    trained: TrainedResults,
) -> list[Trial]:
    """Run the trials with Tune; returns those that need a larger share of a GPU.

    Tune gets them one by one from a searcher. It would copy a grid as a whole for each trial of it
    (``docs/scale.md``).
    """
    from ray import tune

    _keep_keys_out_of_logs()
    # ``TuneCallback`` reports a lost trial in one line; Tune would log a page of traceback.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    pruned: set[str] = set()
    """Keys of the trials that the scheduler pruned."""
    crowded: set[str] = set()
    """Keys of the trials that ran out of a shared GPU's memory."""
    begun: dict[str, Trial] = {}

    gpus = share.gpus

    def next_config() -> dict[str, Any] | None:
        if launch.stop_file.exists() or callback.is_over():
            return None
        # A search learns from each result: it does not propose more while one is to come.
        if source and crowded:
            return None
        trial = next_trial()
        if trial is None:
            return None
        begun[trial.key] = trial
        spec = build_trial_spec(
            trial,
            launch,
            gpus,
            trained.get(trial.key),
            ray_environment(launch),
            share.divides_batch,
        )
        _remove_leftovers(spec)
        return {"spec": spec.to_json()}

    scheduler = None
    if source:
        scheduler = _pruning_scheduler(source, pruned)
    config = tune.TuneConfig(
        search_alg=_searcher(next_config),
        scheduler=scheduler,
        # Without limit: the searcher knows when there are no more trials.
        num_samples=-1,
        max_concurrent_trials=max_concurrent_trials(launch, gpus),
        # A process that has loaded PyTorch, or has a pool, takes one trial after the other.
        reuse_actors=True,
        trial_name_creator=_key_of,
        trial_dirname_creator=_key_of,
    )
    tuner = tune.Tuner(
        _trainable(launch, gpus),
        tune_config=config,
        run_config=_run_config(launch, _tune_callback(callback, pruned, crowded)),
    )
    try:
        tuner.fit()
    except tune.TuneError as error:
        last_line = str(error).strip().splitlines()[-1]
        raise Failure(f"Ray Tune stopped: {last_line}") from None
    return [begun[key] for key in begun if key in crowded]


def _keep_keys_out_of_logs() -> None:
    """Keep Tune from sending cloud keys along with a trial: Ray writes what is sent into its logs.

    The workers do not need them from Tune: those of a private Ray inherit the launch's
    environment, and on a cluster each node has keys of its own.
    """
    from ray.tune.execution import class_cache

    # Tune puts these variables into the runtime environment of each trial's process.
    names: set[str] = getattr(class_cache, "ENV_VARS_TO_PROPAGATE", set())
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def _searcher(next_config: Callable[[], dict[str, Any] | None]) -> Any:
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


def _pruning_scheduler(source: TrialSource, pruned: set[str]) -> Any:
    """Return a scheduler of Tune's that ends a trial when ``source`` prunes it.

    It adds the trial's key to ``pruned``.
    """
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class PruningScheduler(FIFOScheduler):
        def __init__(self, source: TrialSource, pruned: set[str]) -> None:
            super().__init__()
            self.source = source
            self.pruned = pruned

        def __getstate__(self) -> dict[str, Any]:
            """Return nothing, for the reason that ``TrialSearcher`` has."""
            return {}

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            key = _key_of(trial)
            # A resumed trial reports its earlier epochs again: the source must see each of them.
            for report in reports_in(result):
                if self.source.should_prune(key, report.epoch, report.metrics):
                    self.pruned.add(key)
                    return TrialScheduler.STOP
            return TrialScheduler.CONTINUE

    return PruningScheduler(source, pruned)


def _remove_leftovers(spec: TrialSpec) -> None:
    """Remove an earlier launch's files of Ray's and its failures; checkpoints stay."""
    # Ray Train would restore its state of that launch from a folder of the same name.
    shutil.rmtree(f"{spec.storage}/{spec.key}", ignore_errors=True)
    # This launch has its own retries, and an old failure must not be taken for a new one.
    for file in (spec.trial_dir.failure, spec.trial_dir.attempts):
        file.unlink(missing_ok=True)
    if spec.worker.object_store:
        # The worker itself reports an object store that does not answer.
        with suppress(Failure, OSError):
            store = open_object_store(spec.worker.object_store)
            store.remove(f"ray/{spec.key}")
            store.remove(f"trials/{spec.key}/{spec.trial_dir.failure.name}")


def _trainable(launch: LaunchConfig, gpus: float) -> Any:
    from ray import tune

    if launch.backend == "inline":
        from orchestration.backends.inline import run_inline

        resources = {"CPU": launch.worker.cpus_per_worker, "GPU": gpus}
        return tune.with_resources(run_inline, resources)
    from orchestration.backends.worker_pool import PooledTrainable

    return PooledTrainable


def _run_config(launch: LaunchConfig, tune_callback: Any) -> Any:
    from ray import tune

    return tune.RunConfig(
        name="tune",
        storage_path=str(launch.store.resolve() / "ray"),
        callbacks=[tune_callback],
        verbose=0,
        failure_config=tune.FailureConfig(max_failures=launch.worker.retries),
        # Trials write their own checkpoints (``mar/training/checkpoint.py``).
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
    )


def _spec_of(trial: Any) -> Mapping[str, Any]:
    """Return the spec of one of Tune's trials, as JSON."""
    spec: Mapping[str, Any] = trial.config["spec"]
    return spec


def _key_of(trial: Any) -> str:
    return str(_spec_of(trial)["key"])


def _trial_dir_of(trial: Any) -> TrialDir:
    """Return a trial's folder.

    With an object store, what a worker on another node left in it is downloaded first.
    """
    spec = TrialSpec.from_json(_spec_of(trial))
    if spec.worker.object_store:
        # If the download fails, the folder has no result, and the trial is reported as failed.
        with suppress(Failure, OSError):
            store = open_object_store(spec.worker.object_store)
            fetch_trial_dir(store, spec.key, spec.trial_dir)
    return spec.trial_dir


def _was_stopped(trial: Any, reason: FailureReason | None) -> bool:
    """Whether the study was asked to stop: then the trial is neither finished nor failed."""
    stop_file = TrialSpec.from_json(_spec_of(trial)).stop_file
    if reason is not None and reason.kind == "stopped":
        # The request may have been made on another machine: repeat it on this disk, where
        # ``next_config`` looks before it starts another trial.
        stop_file.parent.mkdir(parents=True, exist_ok=True)
        stop_file.touch()
    return stop_file.exists()


def _tune_callback(callback: TrialCallback, pruned: set[str], crowded: set[str]) -> Any:
    """Return a callback of Tune's that passes trials' events on to ``callback``.

    Tune calls it in the launch's own process.
    """
    from ray import tune

    class TuneCallback(tune.Callback):
        def __init__(self, callback: TrialCallback | None, pruned: set[str]) -> None:
            self.callback = callback
            self.pruned = pruned

        def __getstate__(self) -> dict[str, Any]:
            """Return no members, for the reason that ``TrialSearcher`` has."""
            return {"callback": None, "pruned": set()}

        def on_trial_start(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            if self.callback:
                self.callback.started(_key_of(trial))

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            if self.callback:
                for report in reports_in(result):
                    self.callback.epoch(_key_of(trial), report)

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            trial_dir = _trial_dir_of(trial)
            # On a full disk the reason is in the last report and in no file.
            reason = reason_in_report(trial.last_result or {}) or trial_dir.read_failure()
            if reason is None:
                reason = FailureReason("it ended without a result")
            self._ended(trial, trial_dir, reason)

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            error: object = "Ray lost the trial"
            if hasattr(trial, "get_error"):
                error = trial.get_error()
            trial_dir = _trial_dir_of(trial)
            reason = trial_dir.read_failure(error)
            if reason is None:
                reason = FailureReason("Ray lost the trial", "worker_lost")
            self._ended(trial, trial_dir, reason)

        def _ended(self, trial: Any, trial_dir: TrialDir, reason: FailureReason) -> None:
            spec = TrialSpec.from_json(_spec_of(trial))
            # No failure: it is started again, with a larger share.
            is_crowded = reason.kind == "memory" and not spec.divides_batch
            if is_crowded and not trial_dir.is_finished:
                crowded.add(spec.key)
                if self.callback:
                    self.callback.waits(spec.key)
            elif self.callback:
                _report_end(self.callback, self.pruned, trial, trial_dir, reason)

    return TuneCallback(callback, pruned)


def _report_end(
    callback: TrialCallback,
    pruned: set[str],
    trial: Any,
    trial_dir: TrialDir,
    reason: FailureReason,
) -> None:
    """Report how a trial ended.

    It failed for ``reason`` only if it was not pruned, has no result, and was not stopped.
    """
    key = _key_of(trial)
    # First: a pruned trial may have had a result before it was stopped.
    if key in pruned:
        callback.pruned(key)
    # Its process may have been lost after it wrote its result.
    elif trial_dir.is_finished:
        callback.finished(key)
    elif _was_stopped(trial, reason):
        callback.stopped(key)
    else:
        callback.failed(key, reason)
