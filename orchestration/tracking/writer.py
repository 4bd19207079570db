"""Writes runs to MLflow in a background thread, in batches, and retries until they are stored."""

from __future__ import annotations

import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from mar import RESULT_DIR
from mar.errors import Failure, notice
from mar.training.reports import EpochReport
from orchestration.secrets import without_secrets
from orchestration.tracking.client import Metric, is_permanent, mention_refusal, unusable
from orchestration.tracking.mlflow_model import class_names, write_mlflow_model
from orchestration.tracking.store import Store

_NOTICE_EVERY_S = 5.0
"""How often a wait for an unreachable store is reported."""
_METRICS_PER_BATCH = 900
"""MLflow accepts at most 1,000 metrics in one call."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
"""Between two attempts to write; each pause is twice the one before."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Writer:
    """Writes to MLflow in a background thread, in the order of the calls; a caller never waits.

    An operation that fails is retried, and later operations wait for it: a store that was
    unreachable for a while receives everything once. The caller names a run by a key, because the
    run's id is known only after its creation, which may have to wait too.
    """

    def __init__(self, store: Store, patience_s: float = 30.0) -> None:
        self.store = store
        self.client = store.client
        self.patience_s = patience_s
        self._operations: queue.Queue[Callable[[], object] | None] = queue.Queue()
        """What to write, in order; none ends the thread."""
        self._runs: dict[str, str] = {}
        """Key -> the run's id."""
        self._pending: dict[str, list[Metric]] = {}
        """Key -> metrics that are collected and not sent yet."""
        self._last_epoch: dict[str, int] = {}
        """Key -> the newest epoch that is stored or collected."""
        self._last_names: dict[str, set[str]] = {}
        """Key -> the metrics that this process logged of that epoch."""
        self._failure: Exception | None = None
        """Why the last attempt of the current operation failed; none if it did not fail yet."""
        self._abandoned = threading.Event()
        """Set when a caller's patience has ended: nothing more is written."""
        # A daemon, because a thread in a call that hangs would keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def open(self, key: str, find_or_create: Callable[[], str]) -> None:
        """Give the name ``key`` to the run whose id ``find_or_create`` returns."""
        self._operations.put(lambda: self._runs.update({key: find_or_create()}))

    def log_metrics(self, key: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of an epoch, unless an earlier attempt logged that epoch."""
        self.log_report(key, EpochReport(epoch, metrics))

    def log_report(self, key: str, report: EpochReport) -> None:
        """Log a report of an epoch; an epoch that is stored is not logged again.

        This is the only place where replays are dropped. Of a final report, which has the number
        of the last epoch again, the metrics that are not stored are logged: those of the test.
        """
        # The time of the report, not of its writing, which may be minutes later.
        now_ms = int(time.time() * 1000)
        self._operations.put(lambda: self._collect(key, report, now_ms))

    def artifacts(self, key: str, folder: Path, below: str) -> None:
        """Upload a folder's files."""
        self._operations.put(
            lambda: self.client.log_artifacts(self._runs[key], str(folder), artifact_path=below)
        )

    def result(self, key: str, folder: Path, has_model: bool) -> None:
        """Upload a trial's result, and with it what makes it a model for MLflow."""
        self.artifacts(key, folder, RESULT_DIR)
        # A pre-training has no classes, so it classifies nothing.
        classes = class_names(folder)
        if has_model and classes is not None:
            self._operations.put(lambda: self._upload_model_files(key, classes))

    def _upload_model_files(self, key: str, classes: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            write_mlflow_model(Path(scratch), classes)
            self.client.log_artifacts(self._runs[key], scratch, artifact_path=RESULT_DIR)

    def artifact(self, key: str, file: Path) -> None:
        """Upload one file."""
        self._operations.put(lambda: self.client.log_artifact(self._runs[key], str(file)))

    def register(self, key: str, name: str, tags: Mapping[str, str]) -> None:
        """Make the run's result a version of a registered model."""
        self._operations.put(lambda: self.store.register(self._runs[key], name, tags))

    def tag(self, key: str, name: str, value: str) -> None:
        """Set a tag."""
        self._operations.put(lambda: self.client.set_tag(self._runs[key], name, value))

    def after_flush(self, do: Callable[[], object]) -> None:
        """Call ``do`` in the writer's thread when everything before it is written."""
        # Metrics are only collected by their operation, so they must be sent first.
        self._operations.put(self._flush)
        self._operations.put(do)

    def end(self, key: str, status: Status) -> None:
        """Mark a run as ended, when everything before it is written."""
        self._operations.put(self._flush)
        self._operations.put(lambda: self.client.set_terminated(self._runs[key], status))

    def flush(self) -> None:
        """Wait until everything is written.

        Raises:
            Failure: the store was unreachable for ``patience_s``; it writes nothing more.
        """
        # The queue keeps its order: when this event is set, all operations before it are done.
        written = threading.Event()
        self._operations.put(self._flush)
        self._operations.put(written.set)
        began = time.monotonic()
        while not written.wait(timeout=min(_NOTICE_EVERY_S, self.patience_s)):
            # The limit is for failures alone: a large upload may take longer than ``patience_s``.
            if self._failure is None:
                began = time.monotonic()
                continue
            if time.monotonic() - began >= self.patience_s:
                self._abandoned.set()
                raise Failure(unusable(self.store.launch, self._failure))
            reason = without_secrets(str(self._failure).strip().splitlines()[0])[:200]
            notice(
                f"all is trained and safe in {self.store.launch.store}; waiting up to "
                f"{self.patience_s / 60:g} min for "
                f"the tracking store {self.store.launch.shown_tracking} to record it: {reason}"
            )

    def close(self) -> None:
        """Write what is left and end the thread.

        Raises:
            Failure: as ``flush``.
        """
        # After a failed ``flush`` a second one would wait for ``patience_s`` again.
        try:
            if not self._abandoned.is_set():
                self.flush()
        finally:
            self._operations.put(None)
            self._thread.join()

    def _work(self) -> None:
        """Execute operations until one is none; the writer's thread runs this."""
        while (operation := self._operations.get()) is not None:
            self._execute(operation)
            # Metrics are sent when the queue is empty, so that those of many reports share a call:
            # SQLite takes 14,400 metrics a second in batches, 395 one by one.
            if self._operations.empty():
                self._execute(self._flush)

    def _execute(self, operation: Callable[[], object]) -> None:
        """Execute an operation until it succeeds, is refused permanently, or is abandoned."""
        pause_s = _FIRST_PAUSE_S
        while not self._abandoned.is_set():
            try:
                operation()
            # Any exception: an error that is not known as permanent may pass, and an exception that
            # ends this thread would lose everything in the queue.
            except Exception as error:
                # Retrying a refused operation would block all later ones.
                if is_permanent(error):
                    mention_refusal(error)
                    self._failure = None
                    return
                self._failure = error
                self._abandoned.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                self._failure = None
                return

    def _collect(self, key: str, report: EpochReport, now_ms: int) -> None:
        """Add a report's metrics to those that are to be sent, without those that are stored.

        It may be executed again after an error of MLflow's client, so it adds nothing before the
        last call that may fail.
        """
        epoch = report.epoch
        # An earlier launch may have logged epochs of this run.
        if key not in self._last_epoch:
            history = self.client.get_metric_history(self._runs[key], "epoch")
            self._last_epoch[key] = max((point.step for point in history), default=-1)
        metrics = dict(report.metrics)
        if epoch > self._last_epoch[key]:
            self._last_epoch[key] = epoch
            self._last_names[key] = set()
            metrics["epoch"] = epoch
        # The last epoch is stored already, and the test's metrics have its number.
        elif report.is_final:
            metrics = {
                name: value for name, value in metrics.items() if not self._has(key, name, epoch)
            }
        else:
            return
        self._last_names.setdefault(key, set()).update(metrics)
        points = [Metric(name, value, now_ms, epoch) for name, value in metrics.items()]
        self._pending.setdefault(key, []).extend(points)

    def _has(self, key: str, name: str, epoch: int) -> bool:
        """Whether a metric of the newest epoch was logged by this launch or an earlier one."""
        if name in self._last_names.get(key, ()):
            return True
        history = self.client.get_metric_history(self._runs[key], name)
        return any(point.step == epoch for point in history)

    def _flush(self) -> None:
        """Send the collected metrics."""
        # A batch is removed when it is sent: if a later one fails, the retry sends only the rest.
        for key, points in list(self._pending.items()):
            while points:
                self._log(key, points[:_METRICS_PER_BATCH])
                del points[:_METRICS_PER_BATCH]
            del self._pending[key]

    def _log(self, key: str, points: list[Metric]) -> None:
        """Log points of a run; leave out those that MLflow refuses permanently."""
        try:
            self.client.log_batch(self._runs[key], metrics=points)
        except Exception as error:
            if not is_permanent(error):
                raise
            # A KeyError means that the run itself was refused: no point can be written.
            if len(points) == 1 or isinstance(error, KeyError):
                mention_refusal(error)
                return
            # MLflow refuses the whole batch for one point, so each is sent alone.
            for point in points:
                self._log(key, [point])
