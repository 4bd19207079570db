"""The logs of a worker: messages for the user, and the worker's own log."""

from __future__ import annotations

import logging
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch

from mar.distributed import WorkerRank
from orchestration.storage.trial_dir import TrialDir

_STDERR = 2
"""File descriptor of the standard error."""


class WorkerLog(logging.Handler):
    """A worker's own log, for example ``logs/worker0.txt``.

    Messages of the first worker for the user are also written to ``log.txt``.

    While it is open, the warnings of libraries and the log records of this process (level WARNING
    and above) go to the worker's own log.
    """

    def __init__(self, trial_dir: TrialDir, worker_rank: WorkerRank, device: torch.device) -> None:
        super().__init__(logging.WARNING)
        self.file = trial_dir.worker_log(worker_rank.rank)
        # All workers have the same messages for the user: one of them writes them.
        self.user_log: Path | None = None
        if worker_rank.rank == 0:
            self.user_log = trial_dir.log
        self.header = (
            f"worker {worker_rank.rank} of {worker_rank.world} on {platform.node()}, process "
            f"{os.getpid()}, "
            f"{device_name(device)}; what its process prints is in {_target_of(_STDERR)}"
        )

    def __enter__(self) -> WorkerLog:
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        self.note(self.header)
        # Python's warnings become log records, which this handler receives.
        logging.captureWarnings(True)
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        # This process may train another trial, which has a log of its own.
        logging.getLogger().removeHandler(self)
        logging.captureWarnings(False)
        self.note("ends")

    def __call__(self, message: str) -> None:
        """Write a message for the user."""
        self.note(message)
        if self.user_log:
            self._write(self.user_log, message)

    def note(self, message: str) -> None:
        """Write a message to the worker's own log alone."""
        self._write(self.file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def emit(self, record: logging.LogRecord) -> None:
        """Write what was logged to the worker's own log."""
        self.note(f"{record.levelname} {record.name}: {record.getMessage()}")

    def _write(self, file: Path, message: str) -> None:
        # A log is optional. A full disk is reported when a checkpoint or a result is written.
        with suppress(OSError), file.open("a", encoding="utf-8") as stream:
            stream.write(f"{message}\n")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU as its driver reports it, or ``CPU``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU"


def _target_of(descriptor: int) -> str:
    """Return the file that a descriptor of this process is open on."""
    # Only Linux has /proc.
    with suppress(OSError):
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    return "the worker's standard error"
