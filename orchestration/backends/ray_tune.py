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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from mar.errors import Failure, UserError, notice
from orchestration.backends.base import TrainedResults, TrialCallback, TrialSource
from orchestration.backends.gpu_sharing import (
    Share,
    larger_share,
    max_concurrent_trials,
    share_of,
)
from orchestration.backends.ray_env import ray_environment
from orchestration.backends.ray_session import ray_session
from orchestration.backends.tune_callbacks import (
    TrialEnds,
    key_of,
    make_callback,
    make_scheduler,
    make_searcher,
)
from orchestration.config import LaunchConfig
from orchestration.storage.object_store import open_object_store
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
            crowded = _run(next_waiting, source, launch, share, callback, trained)
            waiting = [*crowded, *waiting]
            if launch.stop_file.exists() or callback.is_over():
                for trial in waiting:
                    callback.stopped(trial.key)
                return
            if not crowded:
                return
            share = larger_share(launch, share)
            names = ", ".join(trial.name for trial in crowded)
            if share.divides_batch and share.gpus < 1:
                notice(f"no room on a GPU, and no larger share fits: smaller passes for {names}")
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
    ends = TrialEnds()
    begun: dict[str, Trial] = {}

    def next_config() -> dict[str, Any] | None:
        if launch.stop_file.exists() or callback.is_over():
            return None
        # A search learns from each result: it does not propose more while one is to come.
        if source and ends.crowded:
            return None
        trial = next_trial()
        if trial is None:
            return None
        begun[trial.key] = trial
        environment = ray_environment(launch)
        result = trained.get(trial.key)
        spec = build_trial_spec(trial, launch, share.gpus, result, environment, share.divides_batch)
        _remove_leftovers(spec)
        return {"spec": spec.to_json()}

    tuner = tune.Tuner(
        _trainable(launch, share.gpus),
        tune_config=tune.TuneConfig(
            search_alg=make_searcher(next_config),
            scheduler=make_scheduler(source, ends) if source else None,
            # Without limit: the searcher knows when there are no more trials.
            num_samples=-1,
            max_concurrent_trials=max_concurrent_trials(launch, share.gpus),
            # A process that has loaded PyTorch, or has a pool, takes one trial after the other.
            reuse_actors=True,
            trial_name_creator=key_of,
            trial_dirname_creator=key_of,
        ),
        run_config=_run_config(launch, make_callback(callback, ends)),
    )
    try:
        tuner.fit()
    except tune.TuneError as error:
        last_line = str(error).strip().splitlines()[-1]
        raise Failure(f"Ray Tune stopped: {last_line}") from None
    return [trial for key, trial in begun.items() if key in ends.crowded]


def _keep_keys_out_of_logs() -> None:
    """Keep Tune from sending cloud keys along with a trial: Ray writes what is sent into its logs.

    The workers do not need them from Tune: those of a private Ray inherit the launch's
    environment, and on a cluster each node has keys of its own.
    """
    from ray.tune.execution import class_cache

    # Tune puts these variables into the runtime environment of each trial's process.
    names: set[str] = getattr(class_cache, "ENV_VARS_TO_PROPAGATE", set())
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


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
