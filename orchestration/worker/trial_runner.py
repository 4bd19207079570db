"""What runs where the training is: on a Ray Train worker, in Tune's trial, or here."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mar.atomic_dir import write_text
from mar.config.overrides import build
from mar.distributed import default_device, worker_rank
from mar.errors import Failure, FailureKind, Stopped
from mar.safe_input import read_json
from mar.training.allocator import give_back_freed_memory, keep_freed_memory
from mar.training.loop import Report, fit, reevaluate
from mar.training.retention import RetentionPolicy
from mar.training.step import Execution, Wish
from orchestration.failures import RETRIED, FailureReason, classify_error
from orchestration.storage.object_store import remote
from orchestration.storage.trial_dir import (
    ATTEMPTS,
    FILE,
    HOLDER,
    MICROBATCH,
    read_reason,
    write_reason,
)
from orchestration.storage.trial_sync import fetch_cache
from orchestration.worker.checkpoint_sync import CheckpointSync
from orchestration.worker.log import WorkerLog
from orchestration.worker.monitor import TrainingMonitor
from orchestration.worker.spec import TrialSpec

_PREDECESSOR_S = 20.0
"""How long a worker of a killed launch may live on; it is waited for without a word."""
_LOOKS_S = 2.0
"""How often it is seen whether what is waited for is there."""


def train(
    assignment: dict[str, Any], report: Report, wished: Callable[[], Wish] = lambda: "go on"
) -> FailureReason | None:
    """Train one trial in this process (as one of several, if a process group is up).

    Returns why it was given up, or none when it is finished. What would come again is returned and not raised, so that
    nobody tries again; the reason is in the trial's folder too. Out of memory, it goes on from its last checkpoint in
    passes of half as many clips. With several workers a reason is raised, or the others would wait for this one.
    """
    spec = TrialSpec(**assignment)
    folder = Path(spec.folder)
    torch.set_num_threads(spec.cpus_per_worker)
    device = default_device() if spec.gpus_per_worker else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return FailureReason(f"{folder} cannot be made: {error}; choose another --store", "disk")
    with WorkerLog(folder, worker_rank(), device) as say, _checkpoint_sync(spec, folder) as sync:
        _check_previous_failure(spec, folder, sync)
        if worker_rank().world == 1 and Path(spec.stop_file).exists():
            return _record_failure(folder, FailureReason("stopped before it began", "stopped"))
        cache = spec.settings["data"]["cache"]
        if spec.cache_from and cache:
            fetch_cache(remote(spec.cache_from), Path(cache))
        try:
            return _try(_Trial(spec, folder, device, say, sync), report, wished)
        finally:
            if spec.compile:
                gc.collect()  # compiled blocks refer to themselves
            _give_back_memory(device)  # this process may wait long for its next trial


@dataclass(frozen=True)
class _Trial:
    """What one attempt after the other is made with."""

    spec: TrialSpec
    folder: Path
    device: torch.device
    say: WorkerLog
    sync: CheckpointSync | None


def _try(trial: _Trial, report: Report, wished: Callable[[], Wish]) -> FailureReason | None:
    """Attempt until it is finished, or another attempt would end the same, or there were enough."""
    spec, folder, reason = trial.spec, trial.folder, None
    for here in range(1, spec.retries + 2):
        begun = here
        if (
            worker_rank().rank == 0 and not spec.remote
        ):  # on a disk of a node's own, another launch's count may lie
            begun = max(here, _count_attempt(folder))
        reason = _attempt(trial, report, wished)
        if reason is None or reason.kind == "stopped":
            break
        goes_on = reason.kind != "hang" and reason.kind in _retried(spec)
        if reason.kind == "memory":
            goes_on = _halve_microbatch(spec, folder)
        if worker_rank().world > 1:
            raise Failure(reason.message, reason.kind)
        if not goes_on or begun > spec.retries:
            break
        parts = (
            f" in passes of {_microbatch_clips(spec, folder)} clips"
            if reason.kind == "memory"
            else ""
        )
        trial.say(f"{reason.message}; going on from the last checkpoint{parts}")
        gc.collect()
        _give_back_memory(trial.device)
    return reason


def _count_attempt(folder: Path) -> int:
    """Count an attempt, and return how many this launch has begun.

    Ray tries again too, where a process was lost: without a common count its retries and ours would multiply.
    """
    begun = 0
    with suppress(OSError, ValueError, KeyError, TypeError):
        begun = int(read_json(folder / ATTEMPTS)["begun"])
    with suppress(OSError):  # on a full disk the training has more to say
        write_text(folder / ATTEMPTS, json.dumps({"begun": begun + 1}))
    return begun + 1


def _give_back_memory(device: torch.device) -> None:
    if device.type == "cuda":
        with suppress(RuntimeError):  # after an error of the device, each call raises it again
            torch.cuda.empty_cache()
    else:
        give_back_freed_memory()


def _attempt(trial: _Trial, report: Report, wished: Callable[[], Wish]) -> FailureReason | None:
    """Train, or test, to the end; returns what kept it from that."""
    spec, folder, sync = trial.spec, trial.folder, trial.sync
    settings = build(spec.settings)
    execution = Execution(
        device=trial.device,
        loader_processes=spec.loader_processes,
        max_microbatch_clips=_microbatch_clips(spec, folder),
        activation_checkpointing=spec.activation_checkpointing,
        compile=spec.compile,
        checkpoint_every_steps=spec.checkpoint_every_steps,
        keep=RetentionPolicy(**spec.keep),
        stored=sync.upload if sync else lambda path: None,
        say=trial.say,
    )
    try:
        with TrainingMonitor(
            spec, settings.recipe.batch_size, trial.device, trial.say, wished
        ) as watch:
            execution = replace(
                execution,
                step=watch.step,
                alive=watch.alive,
                try_again=_WaitingForRoom(trial, watch.alive),
            )
            with _alone_in(trial, watch.alive) if worker_rank().rank == 0 else nullcontext():
                if spec.trained:
                    reevaluate(settings, _result_of(spec), folder, report, execution)
                else:
                    for name in sync.restore() if sync else ():
                        trial.say.note(f"{name} fetched from {spec.remote}")
                    fit(settings, folder, report, execution)
                if sync:
                    sync.finished()
    except Stopped as stop:
        reason = FailureReason(str(stop), "stopped")
    except Exception as error:
        reason = classify_error(error)
        trial.say.note(traceback.format_exc())
        if reason.kind == "code":
            trial.say(traceback.format_exc())
    else:
        return None
    return _record_failure(folder, reason)


def _checkpoint_sync(
    spec: TrialSpec, folder: Path
) -> AbstractContextManager[CheckpointSync | None]:
    return (
        CheckpointSync(remote(spec.remote), spec.key, folder, Path(spec.stop_file))
        if spec.remote
        else nullcontext()
    )


def _result_of(spec: TrialSpec) -> Path:
    """Return the result folder that is to be tested again; brings it here where another node trained it."""
    result = Path(spec.trained or "")
    if spec.remote:
        remote(spec.remote).pull_sealed(f"trials/{result.parent.name}/{result.name}", result)
    return result


def _retried(spec: TrialSpec) -> frozenset[FailureKind]:
    numbers: frozenset[FailureKind] = frozenset({"numbers"})
    return RETRIED | numbers if spec.retry_numbers else RETRIED


def _record_failure(folder: Path, reason: FailureReason) -> FailureReason:
    """Leave the reason in the trial's folder; that a worker lost its peer is no news where the peer has left its own."""
    if reason.kind != "node" or read_reason(folder) is None:
        with suppress(OSError):  # on a full disk even the words do not fit
            write_reason(folder, reason)
    return reason


def _check_previous_failure(spec: TrialSpec, folder: Path, sync: CheckpointSync | None) -> None:
    """Give a trial up at once that failed in a way that would come again; forget any other failure.

    Raises:
        Failure: so did the attempt before this one, and Ray tries again all the same.
    """
    reason = read_reason(folder) if worker_rank().world > 1 else None
    if reason and reason.kind not in _retried(spec) | {"stopped"}:
        raise Failure(reason.message, reason.kind)
    if worker_rank().rank == 0:
        (folder / FILE).unlink(missing_ok=True)
        if sync:
            sync.store.remove(f"{sync.name}/{FILE}")


def _microbatch_clips(spec: TrialSpec, folder: Path) -> int | None:
    """Return the largest pass: what was asked for, or less after it was too much."""
    with suppress(OSError, ValueError, KeyError):
        return int(read_json(folder / MICROBATCH)["max_clips_per_pass"])
    return spec.max_microbatch_clips


def _halve_microbatch(spec: TrialSpec, folder: Path) -> bool:
    """Note that passes are to be half as large; false where they cannot be."""
    share_of_batch = build(spec.settings).recipe.batch_size // worker_rank().world
    now = min(_microbatch_clips(spec, folder) or share_of_batch, share_of_batch)
    if now < 4:  # clips come in pairs, to be mixed
        return False
    write_text(folder / MICROBATCH, json.dumps({"max_clips_per_pass": now // 4 * 2}))
    return True


class _WaitingForRoom:
    """Waits for a disk that is full to have room again: others write there too, and remove what they wrote."""

    def __init__(self, trial: _Trial, alive: Callable[[], None]) -> None:
        self.trial, self.alive = trial, alive
        self.refused: tuple[str, float] | None = None
        """The words of the first refusal of one write, and when."""

    def __call__(self, failure: Failure) -> bool:
        """Wait a little; false when it has been long enough, or somebody stops the study."""
        spec, refusal = (
            self.trial.spec,
            str(failure).partition(" (")[0],
        )  # what follows is how much is free
        now = time.monotonic()
        if "the disk is full" not in refusal:
            return False
        if self.refused is None or self.refused[0] != refusal:
            self.refused = (refusal, now)
            self.trial.say(f"{refusal}: waiting up to {spec.patience_s:g} s for room")
        if now - self.refused[1] > spec.patience_s or Path(spec.stop_file).exists():
            return False
        self.alive()
        time.sleep(min(_LOOKS_S, spec.patience_s / 4))
        return True


@contextmanager
def _alone_in(trial: _Trial, alive: Callable[[], None]) -> Generator[None]:
    """Hold the trial's folder; wait while another study, or a worker that outlives its launch for seconds, trains there.

    Raises:
        Stopped: somebody stopped the study while it waited.
    """
    spec, folder = trial.spec, trial.folder
    lock = FileLock(folder / "lock")
    began, is_said = time.monotonic(), False
    while True:
        try:
            lock.acquire(timeout=_LOOKS_S)
            break
        except Timeout:
            alive()
        if not is_said and time.monotonic() - began > _PREDECESSOR_S:
            is_said = True
            trial.say(
                f"waiting for {_holder(folder)}, which trains it now; then its result is taken"
            )
        if Path(spec.stop_file).exists():
            raise Stopped(f"stopped while it waited for {_holder(folder)}")
    with lock, _named_holder(spec, folder):
        yield


@contextmanager
def _named_holder(spec: TrialSpec, folder: Path) -> Generator[None]:
    message = f"the study {Path(spec.stop_file).stem} (process {os.getpid()} on {platform.node()})"
    with suppress(OSError):  # on a full disk the training has more to say
        write_text(folder / HOLDER, message)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)


def _holder(folder: Path) -> str:
    with suppress(OSError):
        return (folder / HOLDER).read_text(encoding="utf-8")
    return "another process"
