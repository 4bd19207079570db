"""Ray Tune runs a grid: a fixed, ordered list of trials, as many at a time as the cluster holds.

Tune is not asked to remember anything: what is finished is in MLflow, what is under way is in the trial's
own checkpoints, and both are found by the trial's settings. So a launch that died is simply launched again,
and no pickle of an earlier one is ever read.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mar import MANIFEST, RESULT
from mar.errors import Failure, UserError
from orchestration.config import LaunchConfig
from orchestration.study import Trial
from orchestration.trial import (
    FAILURE,
    Listener,
    Trained,
    assign,
    quiet_environment,
    reason_of,
    run_inline,
    run_with_workers,
)

_OBJECT_STORE_BYTES = 200 * 2**20
"""Nothing but reports and settings passes through it."""


def run(trials: Sequence[Trial], launch: LaunchConfig, listener: Listener, trained: Trained) -> None:
    """Train (or test) the trials; returns when each is finished or given up.

    Raises:
        UserError: one trial asks for more than the cluster has.
    """
    if launch.backend == "inline" and launch.workers > 1:
        raise UserError("--backend inline trains with one worker; leave it out to use --workers")
    from ray import tune

    ray_folder = launch.store.resolve() / "ray"
    with started(launch):
        gpus = _gpus_per_worker(launch)
        concurrent = _concurrent(launch, gpus)
        assignments = [assign(trial, launch, gpus, trained.get(trial.key)) for trial in trials]
        for assignment in assignments:  # what an earlier launch left of its own; checkpoints stay
            shutil.rmtree(ray_folder / assignment.key, ignore_errors=True)
            (Path(assignment.folder) / FAILURE).unlink(missing_ok=True)
        inline = launch.backend == "inline"
        here = {"CPU": float(launch.cpus_per_worker), "GPU": float(gpus)}
        resources = here if inline else {"node:__internal_head__": 0.001}
        trainable: Any = tune.with_resources(run_inline if inline else run_with_workers, resources)
        tuner = tune.Tuner(
            trainable,
            param_space={"assignment": tune.grid_search([assignment.plain() for assignment in assignments])},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=concurrent,
                reuse_actors=inline,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(ray_folder),
                callbacks=[_listening(listener)],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=launch.retries),
            ),
        )
        try:
            tuner.fit()
        except tune.TuneError as error:
            raise Failure(f"Ray Tune stopped: {reason_of(ray_folder, error)}") from None


@contextmanager
def started(launch: LaunchConfig) -> Generator[None]:
    """Have Ray: the one that this process is in already, or else one that is started here and left afterwards."""
    os.environ.update(quiet_environment(launch))
    import ray

    if ray.is_initialized():
        yield
        return
    _start(launch)
    try:
        yield
    finally:
        stop()


def _start(launch: LaunchConfig) -> None:
    import ray

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    if launch.address is None:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(address=launch.address or "local", **options)
    except ConnectionError as error:
        raise UserError(f"--address {launch.address}: no Ray cluster answers there ({error})") from None


def stop() -> None:
    """Leave Ray.

    Ray ends the whole process, exit code 1, if a reference of its is freed while it shuts down; a garbage collection
    that happens to run in another thread (the tracking writer's) frees some. So there is none meanwhile.
    """
    import ray

    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def cluster_words() -> str:
    """Start a private Ray, run a task on it, stop it; returns what it has."""
    import ray

    with started(LaunchConfig()):
        task: Any = ray.remote(num_cpus=0.1)(lambda: "ran")
        answer: Any = ray.get(task.remote(), timeout=60)
        total = ray.cluster_resources()
        return f"{ray.__version__}: a task {answer}; {total.get('CPU', 0):g} CPU, {total.get('GPU', 0):g} GPU"


def _gpus_per_worker(launch: LaunchConfig) -> int:
    import ray

    if launch.gpus_per_worker is not None:
        return launch.gpus_per_worker
    return 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0


def _concurrent(launch: LaunchConfig, gpus: int) -> int:
    """Return how many trials fit at once; more would wait for each other's workers for ever."""
    import ray

    total = ray.cluster_resources()
    wanted = {"CPU": launch.workers * launch.cpus_per_worker, "GPU": launch.workers * gpus}
    room = min(int(total.get(name, 0) // amount) for name, amount in wanted.items() if amount)
    if room < 1:
        has = ", ".join(f"{total.get(name, 0):g} {name}" for name, amount in wanted.items() if amount)
        asks = ", ".join(f"{amount} {name}" for name, amount in wanted.items() if amount)
        raise UserError(f"--workers {launch.workers}: a trial asks for {asks}, the cluster has {has}")
    return min(room, launch.max_concurrent_trials or room)


def _trial_name(trial: Any) -> str:
    return str(trial.config["assignment"]["key"])


def _listening(listener: Listener) -> Any:
    """Return Tune's callback that tells the listener, in the driver's own process."""
    from ray import tune

    class Listening(tune.Callback):
        def __init__(self, listener: Listener | None) -> None:
            self.listener = listener

        def __getstate__(self) -> dict[str, Any]:
            """Tune pickles its callbacks into a snapshot that nobody reads: leave threads and locks out."""
            return {"listener": None}

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if self.listener:
                self.listener.started(_trial_name(trial))

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            metrics = {name: float(value) for name, value in result.items() if "/" in name}
            if self.listener and metrics:
                self.listener.epoch(_trial_name(trial), int(result["epoch"]), metrics)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            key, folder = _trial_name(trial), Path(trial.config["assignment"]["folder"])
            if self.listener and (folder / RESULT / MANIFEST).is_file():
                self.listener.finished(key)
            elif self.listener:
                self.listener.failed(key, reason_of(folder, "it ended without a result"))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            key = _trial_name(trial)
            error = trial.get_error() if hasattr(trial, "get_error") else "Ray lost the trial"
            if self.listener:
                self.listener.failed(key, reason_of(Path(trial.config["assignment"]["folder"]), error))

    return Listening(listener)
