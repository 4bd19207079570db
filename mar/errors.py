"""What a user is told: two kinds of error, neither of which prints a traceback.

And a training that was asked to stop.
"""

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
"""What went wrong: the settings, the videos, the disk, out of memory, shared memory (/dev/shm) that
is too small, a loss that is not finite, no progress, a machine or process that was lost, the code,
a result that is not what was written; or nothing: somebody stopped it."""


class UserError(ValueError):
    """The user's input is wrong: the message says what, where and what to do. Exit code 2."""

    def __str__(self) -> str:
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
    """A training was asked to stop, and has saved."""


def notice(text: str) -> None:
    """Tell the user something that is no error, on the error stream, once in a process."""
    if text not in _noticed:
        _noticed.add(text)
        print(f"mar: note: {message(text)}", file=sys.stderr, flush=True)


_noticed: set[str] = set()
