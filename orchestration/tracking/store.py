"""MLflow, and nothing else of MLflow anywhere: one writer, in batches, that finds its runs again by tags.

A study is an experiment, a launch of it a parent run (found again, not made anew, when the study goes on), a
trial a child run. A run's tag ``mar.identity`` says which training it is, whatever study it belongs to.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import filelock
import mlflow
import sqlalchemy
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from mar import MANIFEST, RESULT
from mar.config.overrides import flatten
from mar.errors import Failure, notice
from orchestration.config import LaunchConfig
from orchestration.secrets import without_secrets

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
# Of a database that is full for a moment: a page of traceback for what is tried again, and said in our words.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

IDENTITY, KEY, KIND, STUDY = "mar.identity", "mar.key", "mar.kind", "mar.study"
PARENT_RUN = "mlflow.parentRunId"
"""MLflow's tag by which a trial's run is below its study's."""
EXPECTED = "mar.expected"
"""Of a study: how many trials it has or is to have, those of other studies not counted."""
WEIGHTS = "encoder.weights"
TRAINED_BY = "mar.trained_by"
"""Of a trial that was tested, not trained: the key of the trial whose model it is."""
_NO_REGISTRY = ("INVALID_PARAMETER_VALUE", "FEATURE_DISABLED", "ENDPOINT_NOT_FOUND", "PERMISSION_DENIED")
"""What a store answers that keeps no models, or not such: a run is whole without."""
VIEW = "mar"
"""The name of the view that a study's page opens with: columns and order."""
_WHOLE_VIEW: dict[str, Any] = {
    "searchFilter": "",
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "modelVersionFilter": "All Runs",
    "datasetsFilter": [],
    "runsExpanded": {},
    "runsPinned": [],
    "runsHidden": [],
}
_DATABASE_MADE_S = 120.0
"""A new one takes two seconds, on a slow disk ten."""
_SAID_AFTER_S = 5.0
"""Of waiting for a store that is away."""
_PARAMS_PER_BATCH = 90
_METRICS_PER_BATCH = 900

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class RunRecord:
    """A trial as MLflow remembers it."""

    run_id: str
    experiment: str
    experiment_id: str
    status: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def identity(self) -> str:
        """Which training this is."""
        return self.tags.get(IDENTITY, "")

    @property
    def key(self) -> str:
        """The trial's key: its folder's name."""
        return self.tags.get(KEY, "")

    @property
    def has_model(self) -> bool:
        """Whether its result has a model: it was trained, not tested again."""
        return TRAINED_BY not in self.tags

    @property
    def weights(self) -> str | None:
        """The name of the pre-trained weights it started from, if any."""
        return self.tags.get(WEIGHTS)


class Store:
    """The tracking store, for reading and for making runs."""

    def __init__(self, launch: LaunchConfig) -> None:
        self.launch = launch
        with _explained(launch):
            if launch.tracking_uri is None:
                launch.store.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(launch):
                self.client = mlflow.MlflowClient(tracking_uri=launch.tracking)
                experiments = list(self._pages(self.client.search_experiments))
                if launch.tracking_uri is None:
                    _follow_move(launch, [str(each.artifact_location) for each in experiments])

    def trials(self) -> list[RunRecord]:
        """Return every trial's run, of all studies, newest first."""
        with _explained(self.launch), _uncollected():
            names = {item.experiment_id: item.name for item in self._pages(self.client.search_experiments)}
            runs: list[Run] = []
            token = None
            while names:
                page = self.client.search_runs(
                    list(names), f"tags.`{KIND}` = 'trial'", max_results=1000, page_token=token
                )
                runs.extend(page)
                token = page.token
                if not token:
                    break
        return [
            RunRecord(
                run.info.run_id,
                names[run.info.experiment_id],
                run.info.experiment_id,
                run.info.status,
                run.data.metrics,
                run.data.tags,
            )
            for run in runs
        ]

    def expected(self) -> dict[str, int]:
        """Return how many trials each study had, or was to have, at its last launch."""
        with _explained(self.launch):
            names = {item.experiment_id: item.name for item in self._pages(self.client.search_experiments)}
            runs = self.client.search_runs(list(names), f"tags.`{KIND}` = 'study'", max_results=1000) if names else []
        return {names[run.info.experiment_id]: int(run.data.tags.get(EXPECTED, 0)) for run in runs}

    def result_of(self, record: RunRecord) -> Path:
        """Return the result folder of a finished trial: where it was trained, or else fetched from the store.

        Raises:
            Failure: it is in neither place.
        """
        here = self.launch.trial_folder(record.key) / RESULT
        if not (here / MANIFEST).is_file():
            here.parent.mkdir(parents=True, exist_ok=True)
            with _explained(self.launch):
                return Path(self.client.download_artifacts(record.run_id, RESULT, str(here.parent)))
        return here

    def file_of(self, record: RunRecord, name: str) -> Path:
        """Return one file of a finished trial's result, fetched from the store where it is not here.

        Raises:
            Failure: it is in neither place, or the result has no such file.
        """
        here = self.launch.trial_folder(record.key) / RESULT / name
        fetched = self.launch.store.resolve() / "fetched" / record.run_id
        if here.is_file():
            return here
        if (here.parent / MANIFEST).is_file():
            raise Failure(f"{here.parent}: this result has no {name}")
        if not (fetched / name).is_file():
            fetched.mkdir(parents=True, exist_ok=True)
            with _explained(self.launch):
                return Path(self.client.download_artifacts(record.run_id, f"{RESULT}/{name}", str(fetched)))
        return fetched / name

    def experiment(self, study: str) -> str:
        """Return the id of the study's experiment; makes it if there is none."""
        with _explained(self.launch):
            found = self.client.get_experiment_by_name(study)
            if found and found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            if found:
                return found.experiment_id
            kind = {"mlflow.experimentKind": "custom_model_development"}  # its pages show runs first, not LLM traces
            return self.client.create_experiment(study, artifact_location=self.launch.artifacts, tags=kind)

    def show_columns(self, experiment_id: str, metrics: Sequence[str], params: Sequence[str]) -> None:
        """Make the view of an experiment's page (``VIEW``) with these columns, the first metric's best runs on top."""
        columns = ["attributes.`Created`", "attributes.`Duration`"]
        columns += [f"metrics.`{name}`" for name in metrics] + [f"params.`{name}`" for name in params]
        order = {"orderByKey": f"metrics.`{metrics[0]}`", "orderByAsc": False} if metrics else {}
        shown = {**_WHOLE_VIEW, **order, "selectedColumns": columns}
        with _explained(self.launch):
            self.client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(shown))

    def pages(self) -> dict[str, str]:
        """Return each study's page below the server's address: its runs, in the view that ``show_columns`` made."""
        with _explained(self.launch):
            studies = [item for item in self._pages(self.client.search_experiments) if item.experiment_id != "0"]
        return {
            item.name: f"/#/experiments/{item.experiment_id}/runs?viewStateShareKey={VIEW}"
            for item in sorted(studies, key=lambda item: item.name)
        }

    def close_stale(self, experiment_id: str) -> int:
        """Mark as killed the trials of this store that a driver that is no more left running; returns how many."""
        ours = f"{self.launch.store.resolve()}/"
        is_embedded = self.launch.tracking_uri is None  # then all are of this store, wherever it was
        with _explained(self.launch):
            running = self.client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
            folders = {run.info.run_id: run.data.tags.get("folder", "") for run in running}
            stale = [
                run_id for run_id, folder in folders.items() if folder and (is_embedded or folder.startswith(ours))
            ]
            for run_id in stale:
                self.client.set_terminated(run_id, "KILLED")
        return len(stale)

    def register(self, run_id: str, name: str, tags: Mapping[str, str]) -> None:
        """Make a run's result a version of the study's registered model, once: weights in safetensors, no pickle."""
        try:
            if not self.client.search_registered_models(f"name = '{name}'", max_results=1):
                self.client.create_registered_model(name)
            if not self.client.search_model_versions(f"run_id = '{run_id}'"):
                source = f"{self.client.get_run(run_id).info.artifact_uri}/{RESULT}"
                self.client.create_model_version(name, source, run_id, tags=dict(tags))
        except MlflowException as error:
            if error.error_code not in _NO_REGISTRY:  # the store may be away: try again
                raise

    def run(self, experiment_id: str, name: str, find: Mapping[str, str], tags: Mapping[str, str]) -> str:
        """Return the id of the run that has the tags ``find``, running again; makes it if there is none."""
        with _explained(self.launch):
            query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in find.items())
            runs = self.client.search_runs([experiment_id], query, max_results=1)
            if not runs:
                return self.client.create_run(experiment_id, tags={**find, **tags}, run_name=name).info.run_id
            run_id = runs[0].info.run_id
            self.client.update_run(run_id, status="RUNNING")
            self.client.log_batch(run_id, tags=[RunTag(tag, value) for tag, value in tags.items()])
        return run_id

    def parameters(self, run_id: str, settings: Mapping[str, Any]) -> None:
        """Log flattened settings as parameters."""
        params = [Param(path, _parameter(value)) for path, value in flatten(settings).items()]
        with _explained(self.launch):
            for first in range(0, len(params), _PARAMS_PER_BATCH):
                self.client.log_batch(run_id, params=params[first : first + _PARAMS_PER_BATCH])

    def _pages(self, search: Callable[..., Any]) -> Iterator[Any]:
        token = None
        while True:
            page = search(page_token=token)
            yield from page
            token = page.token
            if not token:
                return


class Writer:
    """Writes to MLflow in a thread of its own, in the order of the calls; a caller never waits.

    What cannot be written is tried again, and nothing is written before it: a store that was away for a while gets
    everything, once. Runs are known by a key of the caller's, because they too may have to wait to be made.
    """

    def __init__(self, store: Store, patience_s: float = 30.0) -> None:
        self.store, self.client, self.patience_s = store, store.client, patience_s
        self._orders: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._runs: dict[str, str] = {}
        self._pending: dict[str, list[Metric]] = {}
        self._logged: dict[str, int] = {}
        self._failure: Exception | None = None
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def open(self, key: str, find_or_make: Callable[[], str]) -> None:
        """Let ``key`` name the run whose id ``find_or_make`` returns."""
        self._orders.put(lambda: self._runs.update({key: find_or_make()}))

    def metrics(self, key: str, epoch: int, metrics: Mapping[str, float], again: bool = False) -> None:
        """Log an epoch's metrics, unless an attempt before this one has; ``again`` logs those of them that it has not."""
        now = int(time.time() * 1000)
        self._orders.put(lambda: self._collect(key, epoch, metrics, now, again))

    def artifacts(self, key: str, folder: Path, below: str) -> None:
        """Upload a folder's files."""
        self._orders.put(lambda: self.client.log_artifacts(self._runs[key], str(folder), artifact_path=below))

    def artifact(self, key: str, file: Path) -> None:
        """Upload one file."""
        self._orders.put(lambda: self.client.log_artifact(self._runs[key], str(file)))

    def register(self, key: str, name: str, tags: Mapping[str, str]) -> None:
        """Make the run's result a version of a registered model."""
        self._orders.put(lambda: self.store.register(self._runs[key], name, tags))

    def tag(self, key: str, name: str, value: str) -> None:
        """Set a tag."""
        self._orders.put(lambda: self.client.set_tag(self._runs[key], name, value))

    def then(self, do: Callable[[], object]) -> None:
        """Do something once all that was ordered before is written."""
        self._orders.put(self._flush)
        self._orders.put(do)

    def end(self, key: str, status: Status) -> None:
        """Mark a run as ended, after all that was ordered before."""
        self._orders.put(self._flush)
        self._orders.put(lambda: self.client.set_terminated(self._runs[key], status))

    def flush(self) -> None:
        """Wait until all that was ordered is written.

        Raises:
            Failure: the store could not be written, and was not back within ``patience_s``.
        """
        written = threading.Event()
        self._orders.put(self._flush)
        self._orders.put(written.set)
        began = time.monotonic()
        while not written.wait(timeout=min(_SAID_AFTER_S, self.patience_s)):
            if self._failure is None:  # it is being written, and that takes its time
                began = time.monotonic()
                continue
            if time.monotonic() - began >= self.patience_s:
                self._abandoned.set()
                raise Failure(_unusable(self.store.launch, self._failure))
            reason = without_secrets(str(self._failure).strip().splitlines()[0])[:200]
            notice(
                f"all is trained and safe in {self.store.launch.store}; waiting up to {self.patience_s / 60:g} min for the "
                f"tracking store {self.store.launch.shown_tracking} to write it down: {reason}"
            )

    def close(self) -> None:
        """Write what is left and stop.

        Raises:
            Failure: as ``flush``.
        """
        try:
            if not self._abandoned.is_set():
                self.flush()
        finally:
            self._orders.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            self._carry_out(order)
            if self._orders.empty():
                self._carry_out(self._flush)

    def _carry_out(self, order: Callable[[], object]) -> None:
        pause_s = 0.5
        while not self._abandoned.is_set():
            try:
                order()
            except Exception as error:  # whatever it was, the order stands until it is carried out or given up
                if _never_passes(error):
                    _mention_refusal(error)
                    self._failure = None
                    return
                self._failure = error
                self._abandoned.wait(pause_s)
                pause_s = min(2 * pause_s, 15.0)
            else:
                self._failure = None
                return

    def _collect(self, key: str, epoch: int, metrics: Mapping[str, float], now: int, again: bool) -> None:
        if key not in self._logged:
            history = self.client.get_metric_history(self._runs[key], "epoch")
            self._logged[key] = max((point.step for point in history), default=-1)
        if epoch > self._logged[key] or again:
            self._logged[key] = max(epoch, self._logged[key])
            named = {**metrics, "epoch": epoch}
            if again:
                named = {name: value for name, value in metrics.items() if not self._has(key, name, epoch)}
            points = [Metric(name, value, now, epoch) for name, value in named.items()]
            self._pending.setdefault(key, []).extend(points)

    def _has(self, key: str, name: str, epoch: int) -> bool:
        """Whether a launch that was killed before it could say so has logged it."""
        return any(point.step == epoch for point in self.client.get_metric_history(self._runs[key], name))

    def _flush(self) -> None:
        for key, points in list(self._pending.items()):
            while points:
                self._log(key, points[:_METRICS_PER_BATCH])
                del points[:_METRICS_PER_BATCH]
            del self._pending[key]

    def _log(self, key: str, points: list[Metric]) -> None:
        """Log points of a run; of those that are refused for good each alone, so that the others are written."""
        try:
            self.client.log_batch(self._runs[key], metrics=points)
        except Exception as error:
            if not _never_passes(error):
                raise
            if len(points) == 1 or isinstance(error, KeyError):
                _mention_refusal(error)
                return
            for point in points:
                self._log(key, [point])


@contextlib.contextmanager
def _one_at_a_time(launch: LaunchConfig) -> Generator[None]:
    """Hold the embedded store while its database is opened: two first launches would both make its tables."""
    if launch.tracking_uri is not None or not os.access(launch.store, os.W_OK):
        yield
        return
    try:
        with filelock.FileLock(launch.store / ".database.lock", timeout=_DATABASE_MADE_S):
            yield
    except filelock.Timeout:
        raise Failure(
            f"another process has been making the database in {launch.store} for {_DATABASE_MADE_S:g} s"
        ) from None


_PLACES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "model_versions": ("source", "storage_location"),
    "logged_models": ("artifact_location",),
}
"""Table -> columns of MLflow's database that hold addresses of artifacts."""


def _follow_move(launch: LaunchConfig, locations: Sequence[str]) -> None:
    """Have an embedded store that was moved or copied know where its artifacts are now.

    MLflow writes absolute addresses into its database and has no call that changes them; with the old ones a moved
    store would read from, and write to, the place where it was.
    """
    now = launch.artifacts
    moved = {each for each in locations if each != now and each.startswith("file://") and each.endswith("/artifacts")}
    if not moved or now is None:
        return
    engine = sqlalchemy.create_engine(launch.tracking)
    try:
        known = sqlalchemy.inspect(engine)
        with engine.begin() as connection:
            for table, columns in _PLACES.items():
                if not known.has_table(table):
                    continue
                for column in columns:
                    for old in moved:
                        statement = sqlalchemy.text(
                            f"UPDATE {table} SET {column} = :now || substr({column}, length(:old) + 1) "  # noqa: S608  (our own names)
                            f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'"
                        )
                        connection.execute(statement, {"now": now, "old": old})
    finally:
        engine.dispose()


_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")


def _never_passes(error: Exception) -> bool:
    """Whether the store understood and refused, so that to try again is in vain; or a run is asked for that it refused."""
    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS
    return isinstance(error, KeyError)


def _mention_refusal(error: Exception) -> None:
    reason = without_secrets(str(error).strip().splitlines()[0])[:200]
    notice(f"MLflow refuses something for good, which is left out: {reason}")


def _parameter(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextlib.contextmanager
def _uncollected() -> Generator[None]:
    """Collect no garbage: among the hundred objects that MLflow makes of a run there is none, and looking takes most of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _explained(launch: LaunchConfig) -> Generator[None]:
    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise Failure(_unusable(launch, error)) from None


def _unusable(launch: LaunchConfig, error: Exception) -> str:
    reason = without_secrets(str(error).strip().splitlines()[0])[:200]
    advice = "Is the server up, and --tracking-uri right? " if launch.tracking.startswith("http") else ""
    return (
        f"the tracking store {launch.shown_tracking} cannot be used: {reason}. "
        f"{advice}Checkpoints are safe; when it works again, the same command goes on"
    )


def serve(launch: LaunchConfig, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the command that serves the store's pages on the loopback interface, and its environment.

    The database's address is in the environment: everybody on the machine can read a command line. It answers to this
    machine's own names alone, on any port, for ``ssh -L``: MLflow's default takes ``10.evil.example`` for a private address,
    so that a page of that name could read the store (DNS rebinding).
    """
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    if launch.artifacts:
        command += ["--default-artifact-root", launch.artifacts]
    own = ("localhost", "127.0.0.1", "[::1]")
    environment = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(f"{name},{name}:*" for name in own),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}:{port}" for name in own),
        **os.environ,
    }
    return command, {**environment, "MLFLOW_BACKEND_STORE_URI": launch.tracking}
