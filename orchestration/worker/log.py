"""What a worker says: to a person, and to a log of its own."""

from __future__ import annotations

import logging
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch

from mar.distributed import Share
from orchestration.storage.trial_dir import LOG, LOGS


class WorkerLog(logging.Handler):
    """A worker's log, ``logs/worker0.txt``; what the first worker says is for a person too, and is in ``log.txt``.

    Warnings of libraries and whatever else is logged in this process while it is open go to the worker's own.
    """

    def __init__(self, folder: Path, share: Share, device: torch.device) -> None:
        super().__init__(logging.WARNING)
        self.file, self.is_open = file_of(folder, share), False
        self.told = folder / LOG if share.rank == 0 else None
        self.begins = (
            f"worker {share.rank} of {share.world} on {platform.node()}, process {os.getpid()}, {name_of(device)}; "
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

    def __call__(self, words: str) -> None:
        """Say something to a person."""
        self.note(words)
        if self.told:
            self._write(self.told, words)

    def note(self, words: str) -> None:
        """Write something down for whoever looks."""
        self._write(self.file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {words}")

    def emit(self, record: logging.LogRecord) -> None:
        """Write down what was logged."""
        self.note(f"{record.levelname} {record.name}: {record.getMessage()}")

    def _write(self, file: Path, words: str) -> None:
        with (
            suppress(OSError),
            file.open("a", encoding="utf-8") as stream,
        ):  # a full disk is told of elsewhere
            stream.write(f"{words}\n")


def file_of(folder: Path, share: Share) -> Path:
    """Return a worker's own log."""
    return folder / LOGS / f"worker{share.rank}.txt"


def name_of(device: torch.device) -> str:
    """Return what a device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _where(descriptor: int) -> str:
    """Return the file that is behind a descriptor of this process."""
    with suppress(OSError):
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    return "an unknown place"
