"""Ray Tune runs trials, a fixed, ordered list or what a search proposes, as many at a time as the cluster holds.

Tune is not asked to remember anything: what is finished is in MLflow, what is under way is in the trial's
own checkpoints, and both are found by the trial's settings. So a launch that died is simply launched again,
and no pickle of an earlier one is ever read.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mar import MANIFEST, RESULT_DIR
from mar.errors import Failure, UserError, notice
from orchestration.backends.base import REPLAYED_EPOCHS, TrainedResults, TrialCallback, TrialSource
from orchestration.backends.inline import run_inline
from orchestration.backends.ray_env import quiet_environment
from orchestration.backends.ray_guard import Guard
from orchestration.config import LaunchConfig
from orchestration.failures import FailureReason, reason_in_report
from orchestration.secrets import close_token_file
from orchestration.storage.object_store import remote
from orchestration.storage.trial_dir import ATTEMPTS, FILE, read_reason
from orchestration.storage.trial_sync import fetch_trial_dir
from orchestration.studies.trial import Trial
from orchestration.worker.spec import TrialSpec, build_trial_spec

_TOKEN = secrets.token_hex(32)
"""What protects a private Ray: only this process and what it starts know it."""
_LONGEST_TEMPORARY = 24
"""Characters: ``_private_folder`` and Ray add up to 82, and a socket's path may have 107."""
_OBJECT_STORE_BYTES = 200 * 2**20
"""Nothing but reports and settings passes through it."""


def run(
    trials: Sequence[Trial], launch: LaunchConfig, callback: TrialCallback, trained: TrainedResults
) -> None:
    """Train (or test) the trials; returns when each is finished or given up.

    Raises:
        UserError: one trial asks for more than the cluster has.
    """
    if launch.backend == "inline" and launch.workers > 1:
        raise UserError("--backend inline trains with one worker; leave it out to use --workers")
    waiting = iter(trials)
    _run(lambda: next(waiting, None), None, launch, callback, trained)


def run_search(
    source: TrialSource,
    launch: LaunchConfig,
    callback: TrialCallback,
    announce: Callable[[Trial], None],
) -> None:
    """Train what ``source`` proposes, as many trials at a time as fit; ``announce`` hears of each before it starts.

    Raises:
        UserError: one trial asks for more than the cluster has.
    """

    def announced() -> Trial | None:
        trial = source.next()
        if trial:
            announce(trial)
        return trial

    _run(announced, source, launch, callback, {})


def _run(
    following: Callable[[], Trial | None],
    source: TrialSource | None,
    launch: LaunchConfig,
    callback: TrialCallback,
    trained: TrainedResults,
) -> None:
    """Have Tune run one trial after the other, as many at a time as fit.

    Tune is given them one by one: of a grid it would copy the whole for each of its trials.
    """
    os.environ.update(quiet_environment(launch))  # Ray reads some of it when it is loaded
    from ray import tune

    _keep_keys_out_of_logs()
    # Of a lost trial we tell in our own words; Tune's are a page of traceback.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with started(launch):
        gpus = _gpus_per_worker(launch)

        def assigned() -> dict[str, Any] | None:
            trial = None if launch.stop_file.exists() or callback.is_over() else following()
            if trial is None:
                return None
            assignment = build_trial_spec(
                trial, launch, gpus, trained.get(trial.key), quiet_environment(launch)
            )
            _clean(assignment, launch)
            return {"assignment": assignment.plain()}

        config = tune.TuneConfig(
            search_alg=_searcher(assigned),
            scheduler=_pruning_scheduler(source) if source else None,
            num_samples=-1,
            max_concurrent_trials=_concurrent(launch, gpus),
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        )
        _fit(
            tune.Tuner(
                _trainable(launch, gpus),
                tune_config=config,
                run_config=_run_config(launch, callback),
            ),
            launch,
        )


def _keep_keys_out_of_logs() -> None:
    """Have Tune send no cloud's keys along with a trial: Ray writes what is sent into its logs.

    The workers of a private Ray have the launch's environment; on a cluster each node has keys of its own.
    """
    from ray.tune.execution import class_cache

    names: set[str] = getattr(class_cache, "ENV_VARS_TO_PROPAGATE", set())
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def _searcher(assigned: Callable[[], dict[str, Any] | None]) -> Any:
    """Return Tune's searcher that takes what is proposed; MLflow and Optuna's storage remember, so Tune need not."""
    from ray.tune.search import Searcher

    class TrialSearcher(Searcher):
        def __init__(self, assigned: Callable[[], dict[str, Any] | None]) -> None:
            super().__init__(metric="epoch", mode="max")
            self.assigned = assigned

        def __getstate__(self) -> dict[str, Any]:
            """Tune pickles it into a snapshot that nobody reads: leave storage and threads out."""
            return {}

        def suggest(self, trial_id: str) -> Any:
            return self.assigned() or Searcher.FINISHED

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """The listener hears of it."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing to save."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing to restore."""

    return TrialSearcher(assigned)


def _pruning_scheduler(source: TrialSource) -> Any:
    """Return Tune's scheduler that ends a trial when ``source`` says so."""
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class PruningScheduler(FIFOScheduler):
        def __init__(self, source: TrialSource) -> None:
            super().__init__()
            self.source = source

        def __getstate__(self) -> dict[str, Any]:
            """See ``Proposing``."""
            return {}

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            for epoch in [*result.get(REPLAYED_EPOCHS, []), result]:
                metrics = {
                    name: value
                    for name, value in epoch.items()
                    if "/" in name and isinstance(value, float)
                }
                if "epoch" in epoch and self.source.should_prune(
                    _trial_name(trial), int(epoch["epoch"]), metrics
                ):
                    return TrialScheduler.STOP
            return TrialScheduler.CONTINUE

    return PruningScheduler(source)


def _clean(assignment: TrialSpec, launch: LaunchConfig) -> None:
    """Remove what an earlier launch left of its own; checkpoints stay."""
    shutil.rmtree(launch.store.resolve() / "ray" / assignment.key, ignore_errors=True)
    for name in (FILE, ATTEMPTS):
        (Path(assignment.folder) / name).unlink(missing_ok=True)
    if launch.remote:
        with suppress(Failure, OSError):
            store = remote(launch.remote)
            store.remove(f"ray/{assignment.key}")
            store.remove(f"trials/{assignment.key}/{FILE}")


def _trainable(launch: LaunchConfig, gpus: int) -> Any:
    from ray import tune

    if launch.backend == "inline":
        return tune.with_resources(
            run_inline, {"CPU": float(launch.cpus_per_worker), "GPU": float(gpus)}
        )
    from orchestration.backends.worker_pool import LaneTrial

    return LaneTrial


def _run_config(launch: LaunchConfig, callback: TrialCallback) -> Any:
    from ray import tune

    return tune.RunConfig(
        name="tune",
        storage_path=str(launch.store.resolve() / "ray"),
        callbacks=[_tune_callback(callback)],
        verbose=0,
        failure_config=tune.FailureConfig(max_failures=launch.retries),
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial keeps its own
    )


def _fit(tuner: Any, launch: LaunchConfig) -> None:
    from ray import tune

    try:
        tuner.fit()
    except tune.TuneError as error:
        raise Failure(f"Ray Tune stopped: {str(error).strip().splitlines()[-1]}") from None


@contextmanager
def started(launch: LaunchConfig) -> Generator[None]:
    """Have Ray: the one that this process is in already, or else one that is started here and left afterwards."""
    os.environ.update(quiet_environment(launch))
    import ray

    if ray.is_initialized():
        yield
        return
    guard = (
        Guard(secrets.token_hex(16)) if launch.address is None and sys.platform == "linux" else None
    )
    try:
        _start(launch)
        if guard:
            guard.ray_has_started()
        yield
    finally:
        if guard:
            guard.ray_is_to_stop()
        try:
            stop()
        finally:
            if guard:
                guard.close()


def _start(launch: LaunchConfig) -> None:
    import ray

    options: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "configure_logging": True,
    }
    if launch.address is None:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        options["_temp_dir"] = str(_private_folder() / "ray")
        # A token of this process's own, in no file: Ray would write one below the home folder for everybody to read.
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = _TOKEN
    else:
        close_token_file()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address=launch.address or "local", **options)
    except ConnectionError as error:
        raise UserError(
            f"--address {launch.address}: no Ray cluster answers there ({error})"
        ) from None
    except OSError as error:
        raise Failure(
            f"Ray does not start: {error}. It needs a temporary folder that can be written, with a short path (TMPDIR); "
            "--local runs without Ray"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray puts its own in their place
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _private_folder() -> Path:
    """Return a folder for Ray's sockets and logs that nobody else can enter: Ray itself lets everybody write in its own.

    Raises:
        Failure: there is none.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _LONGEST_TEMPORARY and os.access("/tmp", os.W_OK):  # noqa: S108
        notice(
            f"Ray's sockets are below /tmp: the path of TMPDIR ({parent}) is too long for a socket's"
        )
        parent = Path("/tmp")  # noqa: S108
    folder = parent / f"mar-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if (
            stat.S_ISDIR(state.st_mode)
            and state.st_uid == os.getuid()
            and not state.st_mode & 0o077
        ):
            return folder
        return Path(tempfile.mkdtemp(prefix="mar-", dir=parent))  # somebody else was there first
    except OSError as error:
        raise Failure(
            f"Ray does not start: {error}. It needs a temporary folder that can be written (TMPDIR)"
        ) from None


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
        if os.environ.get("RAY_AUTH_TOKEN") == _TOKEN:
            del os.environ["RAY_AUTH_TOKEN"]


def describe_cluster() -> str:
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

    total, each = ray.cluster_resources(), {"CPU": launch.cpus_per_worker, "GPU": gpus}
    slots = min(int(total.get(name, 0) // amount) for name, amount in each.items() if amount)
    fewest = launch.min_workers or launch.workers
    if slots < fewest:
        has = ", ".join(f"{total.get(name, 0):g} {name}" for name, amount in each.items() if amount)
        asks = ", ".join(f"{fewest * amount} {name}" for name, amount in each.items() if amount)
        raise UserError(f"--workers {fewest}: a trial asks for {asks}, the cluster has {has}")
    room = max(1, slots // launch.workers)
    return min(room, launch.max_concurrent_trials or room)


def _trial_name(trial: Any) -> str:
    return str(trial.config["assignment"]["key"])


def _fetch_trial_dir(trial: Any) -> Path:
    """Return a trial's folder; brings what it left, where that is on another node's disk."""
    assignment = trial.config["assignment"]
    folder = Path(assignment["folder"])
    if assignment["remote"]:
        with suppress(Failure, OSError):  # then it has no result here, and that is said
            fetch_trial_dir(remote(assignment["remote"]), assignment["key"], folder)
    return folder


def _was_stopped(trial: Any, reason: FailureReason | None) -> bool:
    """Whether somebody asked the study to stop: then the trial is neither finished nor failed."""
    stop_file = Path(trial.config["assignment"]["stop_file"])
    if reason is not None and reason.kind == "stopped":
        stop_file.touch()  # asked from another machine, perhaps; no other trial is to begin
    return stop_file.exists()


def _tune_callback(callback: TrialCallback) -> Any:
    """Return Tune's callback that tells the listener, in the driver's own process."""
    from ray import tune

    class TuneCallback(tune.Callback):
        def __init__(self, callback: TrialCallback | None) -> None:
            self.callback = callback

        def __getstate__(self) -> dict[str, Any]:
            """Tune pickles its callbacks into a snapshot that nobody reads: leave threads and locks out."""
            return {"listener": None}

        def on_trial_start(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            if self.callback:
                self.callback.started(_trial_name(trial))

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            for epoch in [*result.get(REPLAYED_EPOCHS, []), result]:
                metrics = {name: float(value) for name, value in epoch.items() if "/" in name}
                if self.callback and metrics:
                    self.callback.epoch(_trial_name(trial), int(epoch["epoch"]), metrics)

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            key, folder = _trial_name(trial), _fetch_trial_dir(trial)
            reason = reason_in_report(trial.last_result or {}) or read_reason(folder)
            if self.callback and (folder / RESULT_DIR / MANIFEST).is_file():
                self.callback.finished(key)
            elif self.callback and not _was_stopped(trial, reason):
                self.callback.failed(key, reason or FailureReason("it ended without a result"))

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            key = _trial_name(trial)
            error = trial.get_error() if hasattr(trial, "get_error") else "Ray lost the trial"
            folder = _fetch_trial_dir(trial)
            reason = read_reason(folder, error)
            if self.callback and (folder / RESULT_DIR / MANIFEST).is_file():  # lost after its end
                self.callback.finished(key)
            elif self.callback and reason and not _was_stopped(trial, reason):
                self.callback.failed(key, reason)

    return TuneCallback(callback)
