"""MLflow, and nothing else of MLflow anywhere: one writer, in batches, that finds its runs again by tags.

A study is an experiment, a launch of it a parent run (found again, not made anew, when the study goes on), a
trial a child run. A run's tag ``mar.identity`` says which training it is, whatever study it belongs to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import mlflow
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from mar.config import flatten
from mar.errors import Failure
from orchestration.config import LaunchConfig

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)

IDENTITY, KEY, KIND, STUDY = "mar.identity", "mar.key", "mar.kind", "mar.study"
_PARAMS_PER_BATCH = 90
_METRICS_PER_BATCH = 900

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class RunRecord:
    """A trial as MLflow remembers it."""

    run_id: str
    experiment: str
    status: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def identity(self) -> str:
        """Which training this is."""
        return self.tags.get(IDENTITY, "")


class Store:
    """The tracking store, for reading and for making runs."""

    def __init__(self, launch: LaunchConfig) -> None:
        self.launch = launch
        with _explained(launch):
            if launch.tracking_uri is None:
                launch.store.mkdir(parents=True, exist_ok=True)
            self.client = mlflow.MlflowClient(tracking_uri=launch.tracking)
            self.client.search_experiments(max_results=1)

    def trials(self) -> list[RunRecord]:
        """Return every trial's run, of all studies, newest first."""
        with _explained(self.launch):
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
            RunRecord(run.info.run_id, names[run.info.experiment_id], run.info.status, run.data.metrics, run.data.tags)
            for run in runs
        ]

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Return a metric's values by epoch."""
        with _explained(self.launch):
            points = self.client.get_metric_history(run_id, metric)
        return sorted({point.step: point.value for point in points}.items())

    def experiment(self, study: str) -> str:
        """Return the id of the study's experiment; makes it if there is none."""
        with _explained(self.launch):
            found = self.client.get_experiment_by_name(study)
            if found:
                return found.experiment_id
            return self.client.create_experiment(study, artifact_location=self.launch.artifacts)

    def run(self, experiment_id: str, name: str, find: Mapping[str, str], tags: Mapping[str, str]) -> str:
        """Return the id of the run that has the tags ``find``, running again; makes it if there is none."""
        with _explained(self.launch):
            query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in find.items())
            runs = self.client.search_runs([experiment_id], query, max_results=1)
            if runs:
                run_id = runs[0].info.run_id
                self.client.update_run(run_id, status="RUNNING")
            else:
                run_id = self.client.create_run(experiment_id, tags=dict(find), run_name=name).info.run_id
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
    """Writes metrics, artifacts and ends of runs in a thread of its own, in order; a caller never waits.

    ``close`` writes what is left. What could not be written is kept and tried again until then.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.client = store, store.client
        self._orders: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._pending: dict[str, list[Metric]] = {}
        self._logged: dict[str, int] = {}
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def metrics(self, run_id: str, epoch: int, metrics: Mapping[str, float], again: bool = False) -> None:
        """Log an epoch's metrics, unless an attempt before this one has; ``again`` logs them in any case."""
        now = int(time.time() * 1000)
        self._orders.put(lambda: self._collect(run_id, epoch, metrics, now, again))

    def artifacts(self, run_id: str, folder: Path, below: str | None = None) -> None:
        """Upload a folder's files."""
        self._orders.put(lambda: self.client.log_artifacts(run_id, str(folder), artifact_path=below))

    def tag(self, run_id: str, name: str, value: str) -> None:
        """Set a tag."""
        self._orders.put(lambda: self.client.set_tag(run_id, name, value))

    def end(self, run_id: str, status: Status) -> None:
        """Mark a run as ended, after all that was ordered before."""
        self._orders.put(lambda: self._end(run_id, status))

    def flush(self) -> None:
        """Wait until all that was ordered is written.

        Raises:
            Failure: the store could not be written.
        """
        written = threading.Event()
        self._orders.put(self._flush)
        self._orders.put(written.set)
        written.wait()
        self._raise()

    def close(self) -> None:
        """Write what is left and stop.

        Raises:
            Failure: the store could not be written.
        """
        self._orders.put(None)
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._failure:
            raise Failure(_unreachable(self.store.launch, self._failure)) from None

    def _work(self) -> None:
        while True:
            order = self._orders.get()
            try:
                if order:
                    order()
                if self._orders.empty():
                    self._flush()
            except Exception as error:
                self._failure = error
            if order is None:
                return

    def _collect(self, run_id: str, epoch: int, metrics: Mapping[str, float], now: int, again: bool) -> None:
        if run_id not in self._logged:
            history = self.client.get_metric_history(run_id, "epoch")
            self._logged[run_id] = max((point.step for point in history), default=0)
        if epoch > self._logged[run_id] or again:
            self._logged[run_id] = max(epoch, self._logged[run_id])
            points = [Metric(name, value, now, epoch) for name, value in {**metrics, "epoch": epoch}.items()]
            self._pending.setdefault(run_id, []).extend(points)

    def _flush(self) -> None:
        for run_id, points in list(self._pending.items()):
            for first in range(0, len(points), _METRICS_PER_BATCH):
                self.client.log_batch(run_id, metrics=points[first : first + _METRICS_PER_BATCH])
            del self._pending[run_id]

    def _end(self, run_id: str, status: Status) -> None:
        self._flush()
        self.client.set_terminated(run_id, status)


def _parameter(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextlib.contextmanager
def _explained(launch: LaunchConfig) -> Generator[None]:
    try:
        yield
    except (MlflowException, OSError, ConnectionError) as error:
        raise Failure(_unreachable(launch, error)) from None


def _unreachable(launch: LaunchConfig, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:200]
    return (
        f"the tracking store {launch.tracking} cannot be used: {reason}. "
        "Is the server up, and --tracking-uri right? Checkpoints are safe; run the same command again"
    )


def serve(launch: LaunchConfig, port: int) -> list[str]:
    """Return the command that serves the store's pages on the loopback interface."""
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [*command, "--backend-store-uri", launch.tracking, *_artifact_options(launch)]


def _artifact_options(launch: LaunchConfig) -> list[str]:
    return ["--default-artifact-root", launch.artifacts] if launch.artifacts else []
