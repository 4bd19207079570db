"""Monitors a training: stop requests, preemption, stalls; writes the heartbeat."""

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

import torch

from mar.atomic_dir import atomic_write
from mar.distributed import all_reduce_max, worker_rank
from mar.training.reports import TrainingSignal
from orchestration.failures import FailureReason
from orchestration.worker.log import device_name
from orchestration.worker.spec import TrialSpec

PollSignal = Callable[[], TrainingSignal]
"""Asks the backend for the signal of the running training."""

_HEARTBEAT_EVERY_S = 2.0
"""Seconds between two writes of the heartbeat file."""
_POLL_EVERY_STEPS = 5
"""Several workers poll at the same steps, because the poll and the agreement on its answer are
collective operations."""
_POLL_EVERY_S = 0.5
"""A single worker polls by the clock, because each answer of Ray takes milliseconds."""


def never_stop() -> TrainingSignal:
    """Return CONTINUE: the poll of a backend that sends no signals."""
    return TrainingSignal.CONTINUE


class TrainingMonitor:
    """Monitors one attempt: ``on_step`` is called after every step and returns the workers' signal.

    A watchdog thread ends the process after no progress for ``hang_timeout_s`` seconds.
    """

    def __init__(
        self,
        spec: TrialSpec,
        batch_size: int,
        device: torch.device,
        log: Callable[[str], None],
        poll_signal: PollSignal = never_stop,
    ) -> None:
        self.trial_dir = spec.trial_dir
        self.stop_file = spec.stop_file
        self.batch_size = batch_size
        self.device = device
        self.log = log
        self.poll_signal = poll_signal
        self.has_saved = False
        """Whether it has saved because of a preempted node: the signal is repeated until that node
        is gone, and one checkpoint is enough."""
        now = time.monotonic()
        self.first_step: tuple[int, float] | None = None
        """The first step of this process and its time. The rate is measured from there: a resumed
        training does not count the steps of earlier attempts."""
        self.last_heartbeat = now
        self.last_poll = now
        self.last_progress = now
        self._over = threading.Event()
        # 0 switches the watchdog off. Its thread is a daemon: it must not keep the process alive.
        timeout_s = spec.worker.hang_timeout_s
        if timeout_s:
            threading.Thread(
                target=self._watchdog, args=(timeout_s,), name="watchdog", daemon=True
            ).start()

    def __enter__(self) -> TrainingMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        # ``mar status`` would later report the old heartbeat as that of a lost trial.
        self._over.set()
        with suppress(OSError):
            self.trial_dir.heartbeat.unlink(missing_ok=True)

    def heartbeat(self) -> None:
        """Record that the training made progress."""
        self.last_progress = time.monotonic()

    def on_step(self, done: int, total: int) -> TrainingSignal:
        """Return the signal after a step.

        With several workers it is the strongest signal that one of them received.
        """
        self.heartbeat()
        self._write_heartbeat(done, total)
        if worker_rank().world > 1 and done % _POLL_EVERY_STEPS:
            return TrainingSignal.CONTINUE
        # Signals are ordered by strength. All workers must act on the same one: a worker that
        # stopped alone would leave the others in a collective operation.
        signal = TrainingSignal(all_reduce_max(int(self._own_signal()), self.device))
        if signal != TrainingSignal.CHECKPOINT:
            return signal
        if self.has_saved:
            return TrainingSignal.CONTINUE
        self.has_saved = True
        self.log(f"a node of this trial is being preempted: saving at step {done}")
        return TrainingSignal.CHECKPOINT

    def _own_signal(self) -> TrainingSignal:
        """Return the signal that this worker received."""
        signal = TrainingSignal.CONTINUE
        # Ray Train's get_preemption_info is collective: no worker may skip the poll by the clock.
        if worker_rank().world > 1 or time.monotonic() - self.last_poll > _POLL_EVERY_S:
            signal = self.poll_signal()
            self.last_poll = time.monotonic()
        if self.stop_file.exists():
            return TrainingSignal.STOP
        return signal

    def _write_heartbeat(self, done: int, total: int) -> None:
        """Write the training's progress to a file every few seconds, for ``mar status``."""
        now = time.monotonic()
        if self.first_step is None:
            self.first_step = (done, now)
        # The workers of a trial may share the folder: only the first one writes.
        if worker_rank().rank or now - self.last_heartbeat < _HEARTBEAT_EVERY_S:
            return
        self.last_heartbeat = now
        steps = done - self.first_step[0]
        seconds = now - self.first_step[1]
        steps_per_s = None
        clips_per_s = None
        if steps and seconds:
            steps_per_s = steps / seconds
            clips_per_s = steps_per_s * self.batch_size
        heartbeat = {
            "step": done,
            "steps": total,
            "steps_per_s": steps_per_s,
            "clips_per_s": clips_per_s,
            "workers": worker_rank().world,
            "device": device_name(self.device),
            "time": time.time(),
            "host": platform.node(),
            "pid": os.getpid(),
        }
        # The heartbeat is optional. A full disk is reported when a checkpoint is written.
        with suppress(OSError):
            atomic_write(self.trial_dir.heartbeat, json.dumps(heartbeat).encode())

    def _watchdog(self, timeout_s: float) -> None:
        """End the process after no progress for ``timeout_s`` seconds.

        Ray, or the user, restarts it.
        """
        while not self._over.wait(min(1.0, timeout_s / 4)):
            if time.monotonic() - self.last_progress < timeout_s:
                continue
            self._end_stalled(timeout_s)

    def _end_stalled(self, timeout_s: float) -> None:
        """Log the stack of every thread, record the failure, and end the process."""
        file = self.trial_dir.worker_log(worker_rank().rank)
        message = f"no progress for {timeout_s:g} s: the stack of every thread is in {file}"
        # The process must end even if the disk cannot be written: it may be the cause of the stall.
        with suppress(OSError):
            with file.open("a", encoding="utf-8") as log:
                log.write(f"{message}\n")
                # faulthandler writes to the file descriptor, past Python's buffer.
                log.flush()
                faulthandler.dump_traceback(file=log, all_threads=True)
            self.trial_dir.write_failure(FailureReason(message, "stalled"))
        print(
            f"mar: {message}; the same command resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        # Not sys.exit: the thread that stalls may never return to Python.
        os._exit(1)
