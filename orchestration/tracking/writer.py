"""Writes runs to MLflow in a thread of its own, in batches, and again until the store has them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from mar.errors import Failure, notice
from mar.training.reports import EpochReport
from orchestration.secrets import without_secrets
from orchestration.tracking.client import Metric, is_permanent, mention_refusal, unusable
from orchestration.tracking.store import Store

_NOTICE_EVERY_S = 5.0
"""How often a wait for a store that is away is mentioned."""
_METRICS_PER_BATCH = 900
"""MLflow takes at most 1,000 in one call."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
"""Between two attempts to write; each pause is twice the one before."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Writer:
    """Writes to MLflow in a thread of its own, in the order of the calls; a caller never waits.

    What cannot be written is tried again, and later operations wait for it: a store that was away
    for a while gets everything, once. Runs are named by a key of the caller's, because their
    creation may have to wait too.
    """

    def __init__(self, store: Store, patience_s: float = 30.0) -> None:
        self.store = store
        self.client = store.client
        self.patience_s = patience_s
        self._operations: queue.Queue[Callable[[], object] | None] = queue.Queue()
        """What is to be written, in order; none ends the thread."""
        self._runs: dict[str, str] = {}
        """Key -> the run's id."""
        self._pending: dict[str, list[Metric]] = {}
        """Key -> metrics that are not sent yet."""
        self._last_epoch: dict[str, int] = {}
        """Key -> the newest epoch that the store has, or is going to have."""
        self._last_names: dict[str, set[str]] = {}
        """Key -> the metrics that this process logged of that epoch."""
        self._failure: Exception | None = None
        """Why the operation at the head of the queue could not be carried out; none: it was, or is
        being tried."""
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def open(self, key: str, find_or_create: Callable[[], str]) -> None:
        """Let ``key`` name the run whose id ``find_or_create`` returns."""
        self._operations.put(lambda: self._runs.update({key: find_or_create()}))

    def log_metrics(self, key: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of an epoch, unless an attempt before this one logged that epoch."""
        self.log_report(key, EpochReport(epoch, metrics))

    def log_report(self, key: str, report: EpochReport) -> None:
        """Log an epoch.

        This is the one place where replays are dropped: an epoch that the store has is not logged
        again.

        Of a final report, the metrics that the store lacks are logged: what the test measured.
        """
        now_ms = int(time.time() * 1000)
        self._operations.put(lambda: self._collect(key, report, now_ms))

    def artifacts(self, key: str, folder: Path, below: str) -> None:
        """Upload a folder's files."""
        self._operations.put(
            lambda: self.client.log_artifacts(self._runs[key], str(folder), artifact_path=below)
        )

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
        """Call ``do`` when everything before it is written."""
        self._operations.put(self._flush)
        self._operations.put(do)

    def end(self, key: str, status: Status) -> None:
        """Mark a run as ended, when everything before it is written."""
        self._operations.put(self._flush)
        self._operations.put(lambda: self.client.set_terminated(self._runs[key], status))

    def flush(self) -> None:
        """Wait until everything is written.

        Raises:
            Failure: the store could not be written, and was not back within ``patience_s``.
        """
        written = threading.Event()
        self._operations.put(self._flush)
        self._operations.put(written.set)
        began = time.monotonic()
        while not written.wait(timeout=min(_NOTICE_EVERY_S, self.patience_s)):
            # While it is being written there is no limit: a large upload takes its time.
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
        """Write what is left and stop.

        Raises:
            Failure: as ``flush``.
        """
        try:
            if not self._abandoned.is_set():
                self.flush()
        finally:
            self._operations.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (operation := self._operations.get()) is not None:
            self._execute(operation)
            # Metrics are collected while there is more to do, and sent when there is not.
            if self._operations.empty():
                self._execute(self._flush)

    def _execute(self, operation: Callable[[], object]) -> None:
        """Carry an operation out.

        Try again until it succeeds, is refused permanently, or is abandoned.
        """
        pause_s = _FIRST_PAUSE_S
        while not self._abandoned.is_set():
            try:
                operation()
            # Whatever the error is, the operation stays at the head of the queue.
            except Exception as error:
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
        """Add a report's metrics to those that are to be sent, but for those that the store has."""
        epoch = report.epoch
        if key not in self._last_epoch:
            history = self.client.get_metric_history(self._runs[key], "epoch")
            self._last_epoch[key] = max((point.step for point in history), default=-1)
        metrics = dict(report.metrics)
        if epoch > self._last_epoch[key]:
            self._last_epoch[key] = epoch
            self._last_names[key] = set()
            metrics["epoch"] = epoch
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
        """Whether a metric of the newest epoch is logged, by this launch or an earlier one."""
        if name in self._last_names.get(key, ()):
            return True
        history = self.client.get_metric_history(self._runs[key], name)
        return any(point.step == epoch for point in history)

    def _flush(self) -> None:
        """Send the collected metrics; what was sent is not sent again if a later batch fails."""
        for key, points in list(self._pending.items()):
            while points:
                self._log(key, points[:_METRICS_PER_BATCH])
                del points[:_METRICS_PER_BATCH]
            del self._pending[key]

    def _log(self, key: str, points: list[Metric]) -> None:
        """Log points of a run.

        If some are refused permanently, each alone, so that the others are written.
        """
        try:
            self.client.log_batch(self._runs[key], metrics=points)
        except Exception as error:
            if not is_permanent(error):
                raise
            if len(points) == 1 or isinstance(error, KeyError):
                mention_refusal(error)
                return
            for point in points:
                self._log(key, [point])
