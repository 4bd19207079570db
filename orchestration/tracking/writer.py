"""Writes runs to MLflow in a thread of its own, in batches, and again until the store has them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from mar.errors import Failure, notice
from orchestration.secrets import without_secrets
from orchestration.tracking.client import Metric, is_permanent, mention_refusal, unusable
from orchestration.tracking.store import Store

_SAID_AFTER_S = 5.0
"""Of waiting for a store that is away."""


_METRICS_PER_BATCH = 900


Status = Literal["FINISHED", "FAILED", "KILLED"]


class Writer:
    """Writes to MLflow in a thread of its own, in the order of the calls; a caller never waits.

    What cannot be written is tried again, and nothing is written before it: a store that was away for a while gets
    everything, once. Runs are known by a key of the caller's, because they too may have to wait to be made.
    """

    def __init__(self, store: Store, patience_s: float = 30.0) -> None:
        self.store, self.client, self.patience_s = store, store.client, patience_s
        self._operations: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._runs: dict[str, str] = {}
        self._pending: dict[str, list[Metric]] = {}
        self._logged: dict[str, int] = {}
        self._failure: Exception | None = None
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def open(self, key: str, find_or_create: Callable[[], str]) -> None:
        """Let ``key`` name the run whose id ``find_or_make`` returns."""
        self._operations.put(lambda: self._runs.update({key: find_or_create()}))

    def metrics(
        self, key: str, epoch: int, metrics: Mapping[str, float], again: bool = False
    ) -> None:
        """Log an epoch's metrics, unless an attempt before this one has; ``again`` logs those of them that it has not."""
        now = int(time.time() * 1000)
        self._operations.put(lambda: self._collect(key, epoch, metrics, now, again))

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
        """Do something once all that was ordered before is written."""
        self._operations.put(self._flush)
        self._operations.put(do)

    def end(self, key: str, status: Status) -> None:
        """Mark a run as ended, after all that was ordered before."""
        self._operations.put(self._flush)
        self._operations.put(lambda: self.client.set_terminated(self._runs[key], status))

    def flush(self) -> None:
        """Wait until all that was ordered is written.

        Raises:
            Failure: the store could not be written, and was not back within ``patience_s``.
        """
        written = threading.Event()
        self._operations.put(self._flush)
        self._operations.put(written.set)
        began = time.monotonic()
        while not written.wait(timeout=min(_SAID_AFTER_S, self.patience_s)):
            if self._failure is None:  # it is being written, and that takes its time
                began = time.monotonic()
                continue
            if time.monotonic() - began >= self.patience_s:
                self._abandoned.set()
                raise Failure(unusable(self.store.launch, self._failure))
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
            self._operations.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (operation := self._operations.get()) is not None:
            self._execute(operation)
            if self._operations.empty():
                self._execute(self._flush)

    def _execute(self, operation: Callable[[], object]) -> None:
        pause_s = 0.5
        while not self._abandoned.is_set():
            try:
                operation()
            except (
                Exception
            ) as error:  # whatever it was, the order stands until it is carried out or given up
                if is_permanent(error):
                    mention_refusal(error)
                    self._failure = None
                    return
                self._failure = error
                self._abandoned.wait(pause_s)
                pause_s = min(2 * pause_s, 15.0)
            else:
                self._failure = None
                return

    def _collect(
        self, key: str, epoch: int, metrics: Mapping[str, float], now: int, again: bool
    ) -> None:
        if key not in self._logged:
            history = self.client.get_metric_history(self._runs[key], "epoch")
            self._logged[key] = max((point.step for point in history), default=-1)
        if epoch > self._logged[key] or again:
            self._logged[key] = max(epoch, self._logged[key])
            named = {**metrics, "epoch": epoch}
            if again:
                named = {
                    name: value
                    for name, value in metrics.items()
                    if not self._has(key, name, epoch)
                }
            points = [Metric(name, value, now, epoch) for name, value in named.items()]
            self._pending.setdefault(key, []).extend(points)

    def _has(self, key: str, name: str, epoch: int) -> bool:
        """Whether a launch that was killed before it could say so has logged it."""
        return any(
            point.step == epoch for point in self.client.get_metric_history(self._runs[key], name)
        )

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
            if not is_permanent(error):
                raise
            if len(points) == 1 or isinstance(error, KeyError):
                mention_refusal(error)
                return
            for point in points:
                self._log(key, [point])
