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
    """Have a SIGTERM, as Slurm and Kubernetes send before they kill, and Ctrl-C do what ``mar stop`` does.

    The trials save first. Ctrl-C for the second time ends everything at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        again = (
            "; Ctrl-C again ends at once, from the last checkpoint"
            if number == signal.SIGINT
            else ""
        )
        print(f"stopping: the trials that run are saving{again}", file=sys.stderr, flush=True)
        with suppress(Failure):  # the object store is away: who looks here stops all the same
            request_stop(launch)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
