"""When a trial that failed is tried again: said here, once.

Three layers can try again: the worker itself, after an error that it caught; Ray Train, after it
lost a worker; Tune, after it lost the trial's own process. Each of them gets the same number of
retries, and all of them share one count, in the trial's folder: whoever starts an attempt adds to
it, and a worker that finds it used up fails permanently. Without the common count the retries of
the layers would multiply.

| failure | who tries again | from |
|---|---|---|
| ``memory`` | the worker | the last checkpoint, with half the micro-batch |
| ``worker_lost`` | Ray Train; Tune for the trial's process; the worker for a loader | the same |
| ``stalled`` | as ``worker_lost``: the watchdog ends the process | the last checkpoint |
| ``non_finite`` | the worker, with ``--retry-non-finite`` | the last checkpoint |
| any other | nobody: it would fail again | |
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
    """How often, and after which failures, a trial is tried again."""

    retries: int
    """Attempts after the first, over all layers."""
    retry_non_finite: bool = False

    @classmethod
    def of(cls, worker: WorkerConfig) -> Self:
        """Return the policy of a launch."""
        return cls(worker.retries, worker.retry_non_finite)

    def is_temporary(self, kind: FailureKind) -> bool:
        """Whether another attempt may end otherwise."""
        if kind == "non_finite":
            return self.retry_non_finite
        return kind in TEMPORARY

    def is_retried_in_process(self, kind: FailureKind) -> bool:
        """Whether the worker's own process can try again: after a stall it no longer exists."""
        return kind != "stalled" and self.is_temporary(kind)

    def count_attempt(self, trial_dir: TrialDir) -> int:
        """Count an attempt that begins.

        Returns how many this launch has begun, in all processes.
        """
        begun = 0
        with suppress(OSError, ValueError, KeyError, TypeError):
            begun = int(read_json(trial_dir.attempts)["begun"])
        # On a full disk the count is not kept; the training itself reports the disk.
        with suppress(OSError):
            atomic_write(trial_dir.attempts, json.dumps({"begun": begun + 1}).encode())
        return begun + 1
