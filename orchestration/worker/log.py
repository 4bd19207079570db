"""What a worker reports: messages for a person, and a log of its own."""

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
"""File descriptor."""


class WorkerLog(logging.Handler):
    """A worker's log, ``logs/worker0.txt``.

    Messages of the first worker for a person are in ``log.txt`` too.

    While it is open, warnings of libraries and everything logged in this process go to the worker's
    log.
    """

    def __init__(self, trial_dir: TrialDir, worker_rank: WorkerRank, device: torch.device) -> None:
        super().__init__(logging.WARNING)
        self.file = trial_dir.worker_log(worker_rank.rank)
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
        logging.captureWarnings(True)
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)
        logging.captureWarnings(False)
        self.note("ends")

    def __call__(self, message: str) -> None:
        """Write a message for a person."""
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
        # A full disk is reported by what must be written: checkpoints and results.
        with suppress(OSError), file.open("a", encoding="utf-8") as stream:
            stream.write(f"{message}\n")


def device_name(device: torch.device) -> str:
    """Return the name of a device as its driver gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU"


def _target_of(descriptor: int) -> str:
    """Return the file that is open under a descriptor of this process."""
    with suppress(OSError):
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    return "the worker's standard error"
