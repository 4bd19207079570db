"""What a worker says: to a person, and to a log of its own."""

from __future__ import annotations

import logging
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch

from mar.distributed import WorkerRank
from orchestration.storage.trial_dir import LOG, LOGS


class WorkerLog(logging.Handler):
    """A worker's log, ``logs/worker0.txt``; what the first worker says is for a person too, and is in ``log.txt``.

    Warnings of libraries and whatever else is logged in this process while it is open go to the worker's own.
    """

    def __init__(self, folder: Path, worker_rank: WorkerRank, device: torch.device) -> None:
        super().__init__(logging.WARNING)
        self.file, self.is_open = file_of(folder, worker_rank), False
        self.user_log = folder / LOG if worker_rank.rank == 0 else None
        self.begins = (
            f"worker {worker_rank.rank} of {worker_rank.world} on {platform.node()}, process {os.getpid()}, {name_of(device)}; "
            f"what its process prints is in {_where(2)}"
        )

    def __enter__(self) -> WorkerLog:
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        self.note(self.begins)
        logging.captureWarnings(True)
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)
        logging.captureWarnings(False)
        self.note("ends")

    def __call__(self, message: str) -> None:
        """Say something to a person."""
        self.note(message)
        if self.user_log:
            self._write(self.user_log, message)

    def note(self, message: str) -> None:
        """Write something down for whoever looks."""
        self._write(self.file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def emit(self, record: logging.LogRecord) -> None:
        """Write down what was logged."""
        self.note(f"{record.levelname} {record.name}: {record.getMessage()}")

    def _write(self, file: Path, message: str) -> None:
        with (
            suppress(OSError),
            file.open("a", encoding="utf-8") as stream,
        ):  # a full disk is told of elsewhere
            stream.write(f"{message}\n")


def file_of(folder: Path, worker_rank: WorkerRank) -> Path:
    """Return a worker's own log."""
    return folder / LOGS / f"worker{worker_rank.rank}.txt"


def name_of(device: torch.device) -> str:
    """Return what a device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _where(descriptor: int) -> str:
    """Return the file that is behind a descriptor of this process."""
    with suppress(OSError):
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    return "an unknown place"
