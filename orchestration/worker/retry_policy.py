"""Decides when a failed trial is tried again.

Three layers can try again: the worker itself, after an error that it caught; Ray Train, after it
lost a worker; Tune, after it lost the trial's own process. Each layer gets the same number of
retries, and all layers share one count, in the trial's folder: each attempt adds one to it, and a
worker that finds the retries used up fails permanently. Without the shared count the retries of
the layers would multiply.

| failure | which layer tries again | from |
|---|---|---|
| ``memory`` | the worker | the last checkpoint, with half the micro-batch |
| ``memory``, on a share of a GPU, with Ray | the launch | the same, with twice the share |
| ``worker_lost`` | Ray Train; Tune for the trial's process; the worker for a loader | the same |
| ``stalled`` | as ``worker_lost``: the watchdog ends the process | the last checkpoint |
| ``non_finite`` | the worker, with ``--retry-non-finite`` | the last checkpoint |
| any other | none: it would fail again | |
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from mar.atomic_dir import atomic_write
from mar.errors import FailureKind
from mar.safe_input import read_json
from orchestration.config import WorkerConfig
from orchestration.failures import TEMPORARY
from orchestration.storage.trial_dir import TrialDir


@dataclass(frozen=True)
class RetryPolicy:
    """Says how often, and after which failures, a trial is tried again."""

    retries: int
    """Attempts after the first, over all layers."""
    retry_non_finite: bool = False

    @classmethod
    def of(cls, worker: WorkerConfig) -> Self:
        """Return the policy of a launch."""
        return cls(worker.retries, worker.retry_non_finite)

    def is_temporary(self, kind: FailureKind) -> bool:
        """Whether another attempt may succeed."""
        # The same settings mostly give the same numbers again, so the user must ask for the retry.
        if kind == "non_finite":
            return self.retry_non_finite
        return kind in TEMPORARY

    def is_retried_in_process(self, kind: FailureKind) -> bool:
        """Whether the worker's own process can try again; after a stall it has been ended."""
        return kind != "stalled" and self.is_temporary(kind)

    def count_attempt(self, trial_dir: TrialDir) -> int:
        """Count a new attempt; returns how many this launch has begun, in all processes."""
        # A missing or damaged count must not stop a training: counting starts again.
        begun = 0
        with suppress(OSError, ValueError, KeyError, TypeError):
            begun = int(read_json(trial_dir.attempts)["begun"])
        # On a full disk the count is not stored; the training itself reports the full disk.
        with suppress(OSError):
            atomic_write(trial_dir.attempts, json.dumps({"begun": begun + 1}).encode())
        return begun + 1
