"""SIGTERM and Ctrl-C: the running trials save, then the launch ends."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

from mar.errors import Failure
from orchestration.config import LaunchConfig
from orchestration.execution.lock import request_stop


@contextmanager
def graceful_shutdown(launch: LaunchConfig) -> Generator[None]:
    """Let SIGTERM and Ctrl-C do what ``mar stop`` does: the trials save, then the launch ends.

    Slurm and Kubernetes send SIGTERM before they kill. A second Ctrl-C ends everything at once.
    """
    # Python lets only the main thread set signal handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_asked = False

    def stop(number: int, frame: object) -> None:
        nonlocal is_asked
        if is_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        is_asked = True
        hint = ""
        if number == signal.SIGINT:
            hint = "; Ctrl-C again ends at once, resuming later from the last checkpoint"
        print(f"stopping: the running trials are saving{hint}", file=sys.stderr, flush=True)
        # If the object store does not answer, the workers that share this disk stop all the same.
        with suppress(Failure):
            request_stop(launch)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        # The next study of this process sets handlers for its own stop file.
        for number, handler in before.items():
            signal.signal(number, handler)
