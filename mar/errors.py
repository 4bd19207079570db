"""Errors whose message is for the user, without a traceback; and the stop of a training."""

from __future__ import annotations

import sys
from typing import Literal

from mar.safe_text import message

FailureKind = Literal[
    "user",
    "data",
    "disk",
    "memory",
    "shm",
    "non_finite",
    "stalled",
    "worker_lost",
    "internal",
    "damaged",
    "stopped",
]
"""The cause, in this order: the settings, the videos, the disk, too little memory, too little
shared memory (/dev/shm), a loss or gradient that is not finite, no progress, a lost machine or
process, the code, a result that changed after it was written; or a stop that was asked for."""


class UserError(ValueError):
    """The user's input is wrong: the message says what, where and what to do. Exit code 2."""

    def __str__(self) -> str:
        # Messages quote names and values from files of others, which may have control characters.
        return message(super().__str__())


class Failure(RuntimeError):
    """The input was right but the work could not be done (disk, network, broken data).

    Exit code 1.
    """

    def __init__(self, message: str, kind: FailureKind = "internal") -> None:
        super().__init__(message)
        self.kind: FailureKind = kind

    def __str__(self) -> str:
        return message(super().__str__())


class Stopped(Exception):
    """A training was asked to stop, and has saved a checkpoint."""


def notice(text: str) -> None:
    """Print a note to the user on the error stream, once in a process; it is not an error."""
    # Standard output is left to the results of a command, which a script may read. Several videos
    # or trials can give the same note.
    if text not in _noticed:
        _noticed.add(text)
        print(f"mar: note: {message(text)}", file=sys.stderr, flush=True)


_noticed: set[str] = set()
