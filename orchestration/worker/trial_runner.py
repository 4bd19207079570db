"""Trains or tests one trial in the current process.

The process is a Ray Train worker, Tune's trial, or the launch itself.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mar.atomic_dir import atomic_write
from mar.config.input_settings import DataConfig
from mar.config.overrides import build
from mar.data.auto_cache import ensure_packed
from mar.distributed import default_device, worker_rank
from mar.errors import Failure, Stopped
from mar.safe_input import read_json
from mar.training.allocator import give_back_freed_memory, keep_freed_memory
from mar.training.loop import fit, reevaluate
from mar.training.reports import EpochReport, TrainingCallbacks
from mar.training.step import RuntimeConfig
from orchestration.failures import FailureReason, classify_error
from orchestration.storage.object_store import open_object_store
from orchestration.storage.trial_dir import TrialDir
from orchestration.storage.trial_sync import fetch_cache
from orchestration.worker.checkpoint_sync import CheckpointSync
from orchestration.worker.log import WorkerLog
from orchestration.worker.monitor import PollSignal, TrainingMonitor, never_stop
from orchestration.worker.retry_policy import RetryPolicy
from orchestration.worker.spec import TrialSpec

_PREDECESSOR_S = 20.0
"""Seconds that a worker of a killed launch may outlive it. A new worker waits this long for the
folder before it logs a message."""
_POLL_S = 2.0
"""Seconds between two checks while it waits."""


def train(
    spec_json: Mapping[str, Any],
    report: Callable[[EpochReport], None],
    poll_signal: PollSignal = never_stop,
) -> FailureReason | None:
    """Train one trial in this process (as one of several workers, if a process group is up).

    Permanent failures are returned, not raised, so that Ray does not retry them; the reason is also
    written to the trial's folder. After an out-of-memory error the trial resumes from its last
    checkpoint with half the micro-batch. With several workers a failure is raised: otherwise the
    other workers would wait for this one.

    Returns:
        Why the trial failed permanently; none when it is finished.
    """
    spec = TrialSpec.from_json(spec_json)
    torch.set_num_threads(spec.worker.threads)
    device = torch.device("cpu")
    if spec.gpus_per_worker:
        device = default_device()
    if device.type == "cuda":
        # Also for a whole device: this process may have had a share of one before.
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec.gpus_per_worker), device)
    # glibc returns large tensors to the system at once, which costs up to half of a step's time.
    if device.type == "cpu":
        keep_freed_memory()
    try:
        spec.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{spec.folder} cannot be created: {error}; choose another --store"
        return FailureReason(message, "disk")
    with (
        WorkerLog(spec.trial_dir, worker_rank(), device) as log,
        _checkpoint_sync(spec) as sync,
    ):
        # After the sync has opened: it may have downloaded the failure that another node recorded.
        _check_previous_failure(spec, sync)
        # Several workers agree on a stop in TrainingMonitor: one that left here alone would leave
        # the others in a collective operation.
        if worker_rank().world == 1 and spec.stop_file.exists():
            stopped = FailureReason("stopped before it started", "stopped")
            return _record_failure(spec.trial_dir, stopped)
        cache = spec.settings["data"]["cache"]
        if spec.worker.cache_from and cache:
            fetch_cache(open_object_store(spec.worker.cache_from), Path(cache))
        try:
            return _attempts(_Trial(spec, device, log, sync), report, poll_signal)
        finally:
            # Compiled blocks refer to themselves. Without --compile there are no such cycles, and
            # a collection would take 0.4 s.
            if spec.worker.compile:
                gc.collect()
            # This process may wait long for its next trial.
            _free_memory(device)


@dataclass(frozen=True)
class _Trial:
    """What all attempts of a trial share."""

    spec: TrialSpec
    device: torch.device
    log: WorkerLog
    sync: CheckpointSync | None

    @property
    def trial_dir(self) -> TrialDir:
        return self.spec.trial_dir


def _attempts(
    trial: _Trial, report: Callable[[EpochReport], None], poll_signal: PollSignal
) -> FailureReason | None:
    """Attempt the trial until it is finished, would fail again, or has used its retries.

    ``RetryPolicy`` decides about another attempt.
    """
    spec = trial.spec
    policy = RetryPolicy.of(spec.worker)
    reason = None
    for attempt in range(1, policy.retries + 2):
        begun = attempt
        # With an object store the folder is on the disk of one node: its count may be from another
        # launch.
        if worker_rank().rank == 0 and not spec.worker.object_store:
            begun = max(attempt, policy.count_attempt(trial.trial_dir))
        reason = _attempt(trial, report, poll_signal)
        if reason is None or reason.kind == "stopped":
            break
        is_retried = policy.is_retried_in_process(reason.kind)
        # Of a shared GPU the launch gives it a larger share first.
        if reason.kind == "memory" and not spec.divides_batch:
            is_retried = False
        # Before the raise below: the restarted workers read the halved micro-batch.
        elif reason.kind == "memory":
            is_retried = _halve_microbatch(spec)
        if worker_rank().world > 1:
            raise Failure(reason.message, reason.kind)
        if not is_retried or begun > policy.retries:
            break
        microbatches = ""
        if reason.kind == "memory":
            microbatches = f" in micro-batches of {_microbatch_clips(spec)} clips"
        trial.log(f"{reason.message}; resuming from the last checkpoint{microbatches}")
        # The failed attempt's model and optimizer must be gone before the next ones are made.
        gc.collect()
        _free_memory(trial.device)
    return reason


def _free_memory(device: torch.device) -> None:
    """Return cached memory to the device or to the operating system."""
    if device.type == "cuda":
        # After a CUDA error, every later call on the device raises that error again.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
    else:
        give_back_freed_memory()


def _attempt(
    trial: _Trial, report: Callable[[EpochReport], None], poll_signal: PollSignal
) -> FailureReason | None:
    """Train or test the trial once; returns the reason if it failed or was stopped."""
    spec = trial.spec
    settings = build(spec.settings)
    runtime = _runtime_config(trial)
    try:
        with TrainingMonitor(
            spec, settings.recipe.batch_size, trial.device, trial.log, poll_signal
        ) as monitor:
            callbacks = TrainingCallbacks(
                report=report,
                log=trial.log,
                on_step=monitor.on_step,
                heartbeat=monitor.heartbeat,
                while_preparing=_alive(trial, monitor.heartbeat),
                on_checkpoint=_on_checkpoint(trial.sync),
                on_write_error=_WaitForRoom(trial, monitor.heartbeat),
            )
            _pack_frames(trial, settings.data, monitor.heartbeat)
            # While it waits for the folder it sends heartbeats, so the watchdog does not end it.
            with _hold_folder(trial, monitor.heartbeat):
                if spec.trained is not None:
                    result = _download_result(spec, spec.trained)
                    reevaluate(settings, result, spec.folder, runtime, callbacks)
                else:
                    _restore_checkpoints(trial)
                    fit(settings, spec.folder, runtime, callbacks)
                if trial.sync:
                    trial.sync.finished()
    except Stopped as stop:
        reason = FailureReason(str(stop), "stopped")
    except Exception as error:
        reason = classify_error(error)
        trial.log.note(traceback.format_exc())
        # Only an error of the code itself needs its traceback in the log for the user.
        if reason.kind == "internal":
            trial.log(traceback.format_exc())
    else:
        return None
    return _record_failure(trial.trial_dir, reason)


def _alive(trial: _Trial, heartbeat: Callable[[], None]) -> Callable[[], None]:
    """Return what a trial calls before its first step: a heartbeat, and a look for a stop."""

    def alive() -> None:
        heartbeat()
        # Of several workers, one that left alone would leave the others in a collective call.
        if worker_rank().world == 1 and trial.spec.stop_file.exists():
            raise Stopped("stopped before the first step; what is cached is kept")

    return alive


def _pack_frames(trial: _Trial, data: DataConfig, heartbeat: Callable[[], None]) -> None:
    """Pack what the node's frame cache lacks, where the settings have ``data.cache: auto``.

    On one machine the launch has packed it before; on a cluster the first trial of a node does.

    Raises:
        Stopped: the study was stopped while it packed; what is packed is kept.
    """
    spec = trial.spec
    if spec.frames is None:
        return

    alive = _alive(trial, heartbeat)

    def progress(done: int, total: int) -> None:
        trial.log.note(f"frame cache: {done} of {total} videos packed")
        alive()

    ensure_packed(data, spec.frames, spec.worker.threads, progress, alive)


def _runtime_config(trial: _Trial) -> RuntimeConfig:
    worker = trial.spec.worker
    return RuntimeConfig(
        device=trial.device,
        loader_processes=worker.loader_processes,
        max_microbatch_clips=_microbatch_clips(trial.spec),
        activation_checkpointing=worker.activation_checkpointing,
        compile=worker.compile,
        checkpoint_every_steps=worker.checkpoint_every_steps,
        keep=worker.keep,
        stable_dir=trial.spec.stable,
        tokens_root=trial.spec.tokens,
    )


def _on_checkpoint(sync: CheckpointSync | None) -> Callable[[Path], None]:
    if sync:
        return sync.upload
    return lambda path: None


def _restore_checkpoints(trial: _Trial) -> None:
    """Download the checkpoints that other nodes wrote."""
    if trial.sync:
        for name in trial.sync.restore():
            trial.log.note(f"{name} downloaded from {trial.spec.worker.object_store}")


def _checkpoint_sync(spec: TrialSpec) -> AbstractContextManager[CheckpointSync | None]:
    if spec.worker.object_store:
        return CheckpointSync(open_object_store(spec.worker.object_store), spec)
    return nullcontext()


def _download_result(spec: TrialSpec, result: Path) -> Path:
    """Return the result folder to test; downloads it if another node trained it."""
    if spec.worker.object_store:
        name = f"trials/{result.parent.name}/{result.name}"
        open_object_store(spec.worker.object_store).download_dir(name, result)
    return result


def _record_failure(trial_dir: TrialDir, reason: FailureReason) -> FailureReason:
    """Write the reason into the trial's folder, and return it.

    The loss of a peer is written only if the peer recorded no reason: that reason is the cause.
    """
    if reason.kind != "worker_lost" or trial_dir.read_failure() is None:
        # On a full disk the reason itself does not fit; the caller still gets it.
        with suppress(OSError):
            trial_dir.write_failure(reason)
    return reason


def _check_previous_failure(spec: TrialSpec, sync: CheckpointSync | None) -> None:
    """Fail at once if the previous attempt failed permanently; otherwise remove its failure file.

    Ray Train restarts the workers after every failure, also after a permanent one.

    Raises:
        Failure: with several workers, the previous attempt failed permanently.
    """
    if worker_rank().world > 1:
        reason = spec.trial_dir.read_failure()
        policy = RetryPolicy.of(spec.worker)
        if reason and reason.kind != "stopped" and not policy.is_temporary(reason.kind):
            raise Failure(reason.message, reason.kind)
    # One worker removes it: with a shared store the file is the same for all of them.
    if worker_rank().rank == 0:
        spec.trial_dir.failure.unlink(missing_ok=True)
        if sync:
            sync.remove_failure()


def _microbatch_clips(spec: TrialSpec) -> int | None:
    """Return the largest micro-batch in clips: as configured, or less after that did not fit."""
    with suppress(OSError, ValueError, KeyError):
        return int(read_json(spec.trial_dir.microbatch)["max_microbatch_clips"])
    return spec.worker.max_microbatch_clips


def _halve_microbatch(spec: TrialSpec) -> bool:
    """Record that micro-batches are to be half as large; false if they cannot be halved."""
    worker_batch = build(spec.settings).recipe.batch_size // worker_rank().world
    clips = min(_microbatch_clips(spec) or worker_batch, worker_batch)
    # A micro-batch has an even number of clips, because mixup and cutmix mix neighbours in pairs.
    if clips < 4:
        return False
    halved = {"max_microbatch_clips": clips // 4 * 2}
    atomic_write(spec.trial_dir.microbatch, json.dumps(halved).encode())
    return True


class _WaitForRoom:
    """Waits until a full disk has room again.

    Other processes write to the same disk, and may remove their files.
    """

    def __init__(self, trial: _Trial, heartbeat: Callable[[], None]) -> None:
        self.trial = trial
        self.heartbeat = heartbeat
        self.refused: tuple[str, float] | None = None
        """The message and the time of the first refusal of one write."""

    def __call__(self, failure: Failure) -> bool:
        """Wait a few seconds; false after ``patience_s`` in all, or if the study is to stop."""
        spec = self.trial.spec
        # The free space in parentheses changes between two tries of the same write.
        refusal = str(failure).partition(" (")[0]
        now = time.monotonic()
        if "the disk is full" not in refusal:
            return False
        if self.refused is None or self.refused[0] != refusal:
            self.refused = (refusal, now)
            self.trial.log(f"{refusal}: waiting up to {spec.worker.patience_s:g} s for room")
        if now - self.refused[1] > spec.worker.patience_s or spec.stop_file.exists():
            return False
        # Waiting for room is no stall: without a heartbeat the watchdog would end the process.
        self.heartbeat()
        time.sleep(min(_POLL_S, spec.worker.patience_s / 4))
        return True


@contextmanager
def _hold_folder(trial: _Trial, heartbeat: Callable[[], None]) -> Generator[None]:
    """Hold the lock of the trial's folder, in the first worker only.

    Waits while another study trains the same trial, or a worker of a killed launch still runs.

    Raises:
        Stopped: the study was stopped while it waited.
    """
    if worker_rank().rank:
        yield
        return
    spec = trial.spec
    lock = FileLock(spec.trial_dir.lock)
    began = time.monotonic()
    is_logged = False
    # Short waits for the lock, not one long wait: a stop request must end the waiting too.
    while True:
        try:
            lock.acquire(timeout=_POLL_S)
            break
        except Timeout:
            heartbeat()
        holder = _holder(spec.trial_dir)
        if not is_logged and time.monotonic() - began > _PREDECESSOR_S:
            is_logged = True
            trial.log(f"waiting for {holder}, which trains this trial now; its result will be used")
        if spec.stop_file.exists():
            raise Stopped(f"stopped while it waited for {holder}")
    with lock, _named_holder(spec):
        yield


@contextmanager
def _named_holder(spec: TrialSpec) -> Generator[None]:
    """Record in the folder which process holds it, until the block ends."""
    file = spec.trial_dir.holder
    holder = f"the study {spec.stop_file.stem} (process {os.getpid()} on {platform.node()})"
    # A full disk is reported by what must be written: checkpoints and results.
    with suppress(OSError):
        atomic_write(file, holder.encode())
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _holder(trial_dir: TrialDir) -> str:
    """Return which process holds the trial's folder."""
    with suppress(OSError):
        return trial_dir.holder.read_text(encoding="utf-8")
    return "another process"
