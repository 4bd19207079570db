"""Ray Tune runs trials concurrently as resources allow.

They are a fixed, ordered list, or what a search proposes.

Tune stores nothing for us: what is finished is in MLflow, what is under way is in the trial's own
checkpoints, and both are found by the trial's settings. So a launch that died is started again from
the beginning, and no pickle of an earlier one is ever read.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from mar.errors import Failure, UserError
from orchestration.backends.base import TrainedResults, TrialCallback, TrialSource, reports_in
from orchestration.backends.ray_env import ray_environment
from orchestration.backends.ray_session import ray_session
from orchestration.config import LaunchConfig
from orchestration.failures import FailureReason, reason_in_report
from orchestration.storage.object_store import open_object_store
from orchestration.storage.trial_dir import TrialDir
from orchestration.storage.trial_sync import fetch_trial_dir
from orchestration.studies.trial import Trial
from orchestration.worker.spec import TrialSpec, build_trial_spec


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
        raise UserError("--backend inline trains with one worker; leave it out to use --workers")
    waiting = iter(trials)
    _run(lambda: next(waiting, None), None, launch, callback, trained)


def run_search(
    source: TrialSource,
    launch: LaunchConfig,
    callback: TrialCallback,
    announce: Callable[[Trial], None],
) -> None:
    """Train what ``source`` proposes, concurrently as resources allow.

    ``announce`` is called before each starts.

    Raises:
        UserError: one trial asks for more than the cluster has.
    """

    def next_announced() -> Trial | None:
        trial = source.next()
        if trial:
            announce(trial)
        return trial

    _run(next_announced, source, launch, callback, {})


def _run(
    next_trial: Callable[[], Trial | None],
    source: TrialSource | None,
    launch: LaunchConfig,
    callback: TrialCallback,
    trained: TrainedResults,
) -> None:
    """Have Tune run the trials.

    Tune gets them one by one from a searcher: of a grid it would copy the whole for each of its
    trials.
    """
    # Ray reads some of it when it is imported.
    os.environ.update(ray_environment(launch))
    from ray import tune

    _keep_keys_out_of_logs()
    # We report a lost trial ourselves; Tune's report is a page of traceback.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with ray_session(launch):
        gpus = _gpus_per_worker(launch)
        pruned: set[str] = set()
        """Keys of the trials that the scheduler ended."""

        def next_config() -> dict[str, Any] | None:
            if launch.stop_file.exists() or callback.is_over():
                return None
            trial = next_trial()
            if trial is None:
                return None
            spec = build_trial_spec(
                trial, launch, gpus, trained.get(trial.key), ray_environment(launch)
            )
            _remove_leftovers(spec)
            return {"spec": spec.to_json()}

        scheduler = None
        if source:
            scheduler = _pruning_scheduler(source, pruned)
        config = tune.TuneConfig(
            search_alg=_searcher(next_config),
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=_max_concurrent_trials(launch, gpus),
            reuse_actors=True,
            trial_name_creator=_key_of,
            trial_dirname_creator=_key_of,
        )
        tuner = tune.Tuner(
            _trainable(launch, gpus),
            tune_config=config,
            run_config=_run_config(launch, _tune_callback(callback, pruned)),
        )
        try:
            tuner.fit()
        except tune.TuneError as error:
            last_line = str(error).strip().splitlines()[-1]
            raise Failure(f"Ray Tune stopped: {last_line}") from None


def _keep_keys_out_of_logs() -> None:
    """Have Tune send no cloud keys along with a trial: Ray writes what is sent into its logs.

    The workers of a private Ray inherit the launch's environment; on a cluster each node has keys
    of its own.
    """
    from ray.tune.execution import class_cache

    names: set[str] = getattr(class_cache, "ENV_VARS_TO_PROPAGATE", set())
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def _searcher(next_config: Callable[[], dict[str, Any] | None]) -> Any:
    """Return Tune's searcher that proposes the next trial.

    MLflow and Optuna's storage remember, so Tune need not.
    """
    from ray.tune.search import Searcher

    class TrialSearcher(Searcher):
        def __init__(self, next_config: Callable[[], dict[str, Any] | None]) -> None:
            super().__init__(metric="epoch", mode="max")
            self.next_config = next_config

        def __getstate__(self) -> dict[str, Any]:
            """Tune pickles it into a snapshot that is never read: leave storage and threads out."""
            return {}

        def suggest(self, trial_id: str) -> Any:
            return self.next_config() or Searcher.FINISHED

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """The callback gets it."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing to save."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing to restore."""

    return TrialSearcher(next_config)


def _pruning_scheduler(source: TrialSource, pruned: set[str]) -> Any:
    """Return Tune's scheduler that ends a trial when ``source`` prunes it.

    It adds the trial's key to ``pruned``.
    """
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class PruningScheduler(FIFOScheduler):
        def __init__(self, source: TrialSource, pruned: set[str]) -> None:
            super().__init__()
            self.source = source
            self.pruned = pruned

        def __getstate__(self) -> dict[str, Any]:
            """See ``TrialSearcher``."""
            return {}

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            key = _key_of(trial)
            for report in reports_in(result):
                if self.source.should_prune(key, report.epoch, report.metrics):
                    self.pruned.add(key)
                    return TrialScheduler.STOP
            return TrialScheduler.CONTINUE

    return PruningScheduler(source, pruned)


def _remove_leftovers(spec: TrialSpec) -> None:
    """Remove what an earlier launch left of its own; checkpoints stay."""
    shutil.rmtree(f"{spec.storage}/{spec.key}", ignore_errors=True)
    for file in (spec.trial_dir.failure, spec.trial_dir.attempts):
        file.unlink(missing_ok=True)
    if spec.worker.object_store:
        # An object store that is away is reported by the worker.
        with suppress(Failure, OSError):
            store = open_object_store(spec.worker.object_store)
            store.remove(f"ray/{spec.key}")
            store.remove(f"trials/{spec.key}/{spec.trial_dir.failure.name}")


def _trainable(launch: LaunchConfig, gpus: int) -> Any:
    from ray import tune

    if launch.backend == "inline":
        from orchestration.backends.inline import run_inline

        resources = {"CPU": float(launch.worker.cpus_per_worker), "GPU": float(gpus)}
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
        # A trial keeps its own checkpoints.
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
    )


def _gpus_per_worker(launch: LaunchConfig) -> int:
    import ray

    if launch.worker.gpus_per_worker is not None:
        return launch.worker.gpus_per_worker
    return int(ray.cluster_resources().get("GPU", 0) >= 1)


def _max_concurrent_trials(launch: LaunchConfig, gpus: int) -> int:
    """Return how many trials fit at once.

    With more of them, trials would wait for each other's workers for ever.

    Raises:
        UserError: not one fits.
    """
    import ray

    worker = launch.worker
    total = ray.cluster_resources()
    per_worker = {"CPU": worker.cpus_per_worker, "GPU": gpus}
    asked = {name: amount for name, amount in per_worker.items() if amount}
    num_workers = min(int(total.get(name, 0) // amount) for name, amount in asked.items())
    fewest = worker.min_workers or worker.workers
    if num_workers < fewest:
        has = ", ".join(f"{total.get(name, 0):g} {name}" for name in asked)
        asks = ", ".join(f"{fewest * amount} {name}" for name, amount in asked.items())
        raise UserError(f"--workers {fewest}: a trial asks for {asks}, the cluster has {has}")
    num_trials = max(1, num_workers // worker.workers)
    return min(num_trials, launch.max_concurrent_trials or num_trials)


def _spec_of(trial: Any) -> Mapping[str, Any]:
    """Return the spec of one of Tune's trials, as JSON."""
    spec: Mapping[str, Any] = trial.config["spec"]
    return spec


def _key_of(trial: Any) -> str:
    return str(_spec_of(trial)["key"])


def _trial_dir_of(trial: Any) -> TrialDir:
    """Return a trial's folder.

    Where another node's disk has it, what it left is downloaded first.
    """
    spec = TrialSpec.from_json(_spec_of(trial))
    if spec.worker.object_store:
        # If it cannot be downloaded, the trial has no result here, and that is reported.
        with suppress(Failure, OSError):
            store = open_object_store(spec.worker.object_store)
            fetch_trial_dir(store, spec.key, spec.trial_dir)
    return spec.trial_dir


def _was_stopped(trial: Any, reason: FailureReason | None) -> bool:
    """Whether the study was asked to stop: then the trial is neither finished nor failed."""
    stop_file = TrialSpec.from_json(_spec_of(trial)).stop_file
    if reason is not None and reason.kind == "stopped":
        # Asked for on another machine, perhaps; no other trial is to start.
        stop_file.parent.mkdir(parents=True, exist_ok=True)
        stop_file.touch()
    return stop_file.exists()


def _tune_callback(callback: TrialCallback, pruned: set[str]) -> Any:
    """Return Tune's callback, which passes a trial's events on, in the driver's own process."""
    from ray import tune

    class TuneCallback(tune.Callback):
        def __init__(self, callback: TrialCallback | None, pruned: set[str]) -> None:
            self.callback = callback
            self.pruned = pruned

        def __getstate__(self) -> dict[str, Any]:
            """Leave threads out: Tune pickles callbacks into a snapshot that is never read."""
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
            """Pass on how a trial ended.

            ``reason`` holds unless there is a result, or it was ended on purpose.
            """
            if not self.callback:
                return
            key = _key_of(trial)
            if key in self.pruned:  # it may have had a result before it was stopped
                self.callback.pruned(key)
            elif trial_dir.is_finished:  # its process may have been lost after that
                self.callback.finished(key)
            elif _was_stopped(trial, reason):
                self.callback.stopped(key)
            else:
                self.callback.failed(key, reason)

    return TuneCallback(callback, pruned)
