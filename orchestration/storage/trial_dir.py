"""The files of a trial's folder: one class knows their names.

The names are frozen: a change would make the folders of earlier versions unreadable.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mar import MANIFEST, RESULT_DIR
from mar.atomic_dir import atomic_write
from mar.safe_input import read_json
from orchestration.failures import FailureReason


@dataclass(frozen=True)
class TrialDir:
    """A trial's folder."""

    root: Path

    @property
    def log(self) -> Path:
        """Messages of its workers for people."""
        return self.root / "log.txt"

    @property
    def worker_logs(self) -> Path:
        """Folder with a log of each worker: what it ran on, warnings, tracebacks, stacks."""
        return self.root / "logs"

    def worker_log(self, rank: int) -> Path:
        """Return the log of one worker."""
        return self.worker_logs / f"worker{rank}.txt"

    @property
    def heartbeat(self) -> Path:
        """The training's progress, for ``mar status``; removed when the training ends or fails.

        An old heartbeat that was not removed means that the worker was killed.
        """
        return self.root / "heartbeat.json"

    @property
    def attempts(self) -> Path:
        """How often this launch has started to train it, counted across its processes."""
        return self.root / "attempts.json"

    @property
    def pruning(self) -> Path:
        """The retention policy, while the checkpoints of a finished training are being removed."""
        return self.root / "pruning.json"

    @property
    def holder(self) -> Path:
        """Which process trains it now."""
        return self.root / "holder.txt"

    @property
    def lock(self) -> Path:
        """Held by the worker that trains it."""
        return self.root / "lock"

    @property
    def record(self) -> Path:
        """Its study, name and tags, from which ``mar recover`` makes its MLflow run again."""
        return self.root / "trial.json"

    @property
    def microbatch(self) -> Path:
        """The micro-batch, in clips, that fits in memory, after a larger one did not."""
        return self.root / "microbatch.json"

    @property
    def failure(self) -> Path:
        """Why it failed permanently, written by the process in which it failed."""
        return self.root / "failure.json"

    @property
    def result(self) -> Path:
        """Folder with the result of a finished training."""
        return self.root / RESULT_DIR

    @property
    def metrics(self) -> Path:
        """The final metrics of a finished training."""
        return self.result / "metrics.json"

    @property
    def is_finished(self) -> bool:
        """Whether it has a complete result."""
        # The manifest is written last, so a folder without one is incomplete.
        return (self.result / MANIFEST).is_file()

    def checkpoints(self) -> list[Path]:
        """Return the folders of its checkpoints, the newest last."""
        # The number of the step has leading zeros, so names sort by step.
        return sorted(self.root.glob("step_*"))

    def num_epochs_done(self) -> int:
        """Return the finished epochs of its newest readable checkpoint; 0 without one."""
        for checkpoint in reversed(self.checkpoints()):
            try:
                return len(read_json(checkpoint / MANIFEST)["progress"]["history"])
            # The checkpoint is damaged, or a worker is removing it now.
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return 0

    def write_failure(self, reason: FailureReason) -> None:
        """Record why the trial failed permanently."""
        # The launch may read the file at any time, so it must never see a half of it.
        atomic_write(self.failure, json.dumps(asdict(reason), ensure_ascii=False).encode())

    def read_failure(self, error: object = None) -> FailureReason | None:
        """Return why the trial failed permanently.

        The reason that its own process recorded comes first. Without one, ``error`` (Ray's) means
        that Ray lost the process; without an error either, the trial has not failed.
        """
        # A file that cannot be read counts as none, so that a damaged one never hides the failure.
        try:
            return FailureReason(**read_json(self.failure))
        except (OSError, ValueError, TypeError):
            pass
        if error is None:
            return None
        # The last line of a traceback has the error itself.
        lines = str(error).strip().splitlines()
        message = lines[-1] if lines else "Ray lost the trial"
        return FailureReason(message, "worker_lost")
