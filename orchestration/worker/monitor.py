"""What a worker heeds while it trains: a wish to stop, a node that is about to go, a hang; and the pulse it gives."""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from mar.distributed import all_reduce_max, worker_rank
from mar.training.step import Wish
from orchestration.failures import FailureReason
from orchestration.storage.trial_dir import HEARTBEAT, write_reason
from orchestration.worker.log import file_of, name_of
from orchestration.worker.spec import TrialSpec

_HEARTBEAT_EVERY_S = 2.0
_ASK_EVERY_STEPS = 5
"""Several workers must ask at the same steps, to agree."""
_ASK_EVERY_S = 0.5
"""One alone asks Ray by the clock: an answer takes milliseconds."""
_WISHES: tuple[Wish, ...] = ("go on", "save", "stop", "leave")


class TrainingMonitor:
    """Told of every step; answers whether to go on, to save at once, or to save and stop."""

    def __init__(
        self,
        spec: TrialSpec,
        batch_size: int,
        device: torch.device,
        say: Callable[[str], None],
        wished: Callable[[], Wish] = lambda: "go on",
    ) -> None:
        self.folder, self.stop_file = Path(spec.folder), Path(spec.stop_file)
        self.batch_size, self.device, self.say, self.wished = batch_size, device, say, wished
        self.has_saved = False
        self.first: tuple[int, float] | None = None
        self.last_heartbeat = self.asked = self.last_progress = time.monotonic()
        self._over = threading.Event()
        if spec.hang_timeout_s:
            threading.Thread(
                target=self._watchdog, args=(spec.hang_timeout_s,), name="watchdog", daemon=True
            ).start()

    def __enter__(self) -> TrainingMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with suppress(OSError):
            (self.folder / HEARTBEAT).unlink(missing_ok=True)

    def alive(self) -> None:
        """Note that something was done."""
        self.last_progress = time.monotonic()

    def step(self, done: int, of: int) -> Wish:
        """Return what is wished after a step; with several workers, what any of them was asked."""
        self.alive()
        self._write_heartbeat(done, of)
        if worker_rank().world > 1 and done % _ASK_EVERY_STEPS:
            return "go on"
        strongest = all_reduce_max(_WISHES.index(self._own()), self.device)
        if _WISHES[strongest] == "save":
            is_first, self.has_saved = not self.has_saved, True
            if is_first:
                self.say(f"a node of this trial is to go: saving at step {done}")
            return "save" if is_first else "go on"
        return _WISHES[strongest]

    def _own(self) -> Wish:
        is_time = worker_rank().world > 1 or time.monotonic() - self.asked > _ASK_EVERY_S
        wish = self.wished() if is_time else "go on"
        self.asked = time.monotonic() if is_time else self.asked
        return "stop" if self.stop_file.exists() else wish

    def _write_heartbeat(self, done: int, of: int) -> None:
        now = time.monotonic()
        self.first = self.first or (done, now)
        if worker_rank().rank or now - self.last_heartbeat < _HEARTBEAT_EVERY_S:
            return
        self.last_heartbeat = now
        steps, seconds = done - self.first[0], now - self.first[1]
        rate = steps / seconds if steps and seconds else None
        heartbeat = {
            "step": done,
            "steps": of,
            "steps_per_s": rate,
            "clips_per_s": rate * self.batch_size if rate else None,
            "workers": worker_rank().world,
            "device": name_of(self.device),
            "time": time.time(),
            "host": platform.node(),
            "pid": os.getpid(),
        }
        with suppress(OSError):  # a full disk is told of by what must be written
            unfinished = self.folder / f".{HEARTBEAT}"
            unfinished.write_text(json.dumps(heartbeat), encoding="utf-8")
            unfinished.replace(self.folder / HEARTBEAT)

    def _watchdog(self, timeout_s: float) -> None:
        """End the process when nothing was done for too long: whoever started it then starts it again."""
        while not self._over.wait(min(1.0, timeout_s / 4)):
            if time.monotonic() - self.last_progress < timeout_s:
                continue
            file = file_of(self.folder, worker_rank())
            message = f"no progress for {timeout_s:g} s: what every thread was doing is in {file}"
            with suppress(OSError):
                with file.open("a", encoding="utf-8") as log:
                    log.write(f"{message}\n")
                    log.flush()
                    faulthandler.dump_traceback(file=log, all_threads=True)
                write_reason(self.folder, FailureReason(message, "hang"))
            print(
                f"mar: {message}; the same command resumes from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
