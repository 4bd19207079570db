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
from mar.distributed import default_device, share
from mar.errors import Failure, FailureKind, Stopped
from mar.safe_input import read_json
from mar.training.allocator import give_back_freed_memory, keep_freed_memory
from mar.training.loop import Report, fit, test_again
from mar.training.retention import Keep
from mar.training.step import Execution, Wish
from orchestration.failures import RETRIED, Reason, reason_of
from orchestration.storage.object_store import remote
from orchestration.storage.trial_dir import (
    ATTEMPTS,
    FILE,
    HOLDER,
    PASSES,
    read_reason,
    write_reason,
)
from orchestration.storage.trial_sync import fetch_cache
from orchestration.worker.checkpoint_sync import Copies
from orchestration.worker.log import WorkerLog
from orchestration.worker.monitor import Watch
from orchestration.worker.spec import Assignment

_PREDECESSOR_S = 20.0
"""How long a worker of a killed launch may live on; it is waited for without a word."""
_LOOKS_S = 2.0
"""How often it is seen whether what is waited for is there."""


def train(
    assignment: dict[str, Any], report: Report, wished: Callable[[], Wish] = lambda: "go on"
) -> Reason | None:
    """Train one trial in this process (as one of several, if a process group is up).

    Returns why it was given up, or none when it is finished. What would come again is returned and not raised, so that
    nobody tries again; the reason is in the trial's folder too. Out of memory, it goes on from its last checkpoint in
    passes of half as many clips. With several workers a reason is raised, or the others would wait for this one.
    """
    told = Assignment(**assignment)
    folder = Path(told.folder)
    torch.set_num_threads(told.cpus_per_worker)
    device = default_device() if told.gpus_per_worker else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return Reason(f"{folder} cannot be made: {error}; choose another --store", "disk")
    with WorkerLog(folder, share(), device) as say, _copies(told, folder) as copies:
        _heed_earlier(told, folder, copies)
        if share().world == 1 and Path(told.stop_file).exists():
            return _left(folder, Reason("stopped before it began", "stopped"))
        cache = told.settings["data"]["cache"]
        if told.cache_from and cache:
            fetch_cache(remote(told.cache_from), Path(cache))
        try:
            return _try(_Trial(told, folder, device, say, copies), report, wished)
        finally:
            if told.compile:
                gc.collect()  # compiled blocks refer to themselves
            _give_back_memory(device)  # this process may wait long for its next trial


@dataclass(frozen=True)
class _Trial:
    """What one attempt after the other is made with."""

    told: Assignment
    folder: Path
    device: torch.device
    say: WorkerLog
    copies: Copies | None


def _try(trial: _Trial, report: Report, wished: Callable[[], Wish]) -> Reason | None:
    """Attempt until it is finished, or another attempt would end the same, or there were enough."""
    told, folder, reason = trial.told, trial.folder, None
    for here in range(1, told.retries + 2):
        begun = here
        if (
            share().rank == 0 and not told.remote
        ):  # on a disk of a node's own, another launch's count may lie
            begun = max(here, _count_attempt(folder))
        reason = _attempt(trial, report, wished)
        if reason is None or reason.kind == "stopped":
            break
        goes_on = reason.kind != "hang" and reason.kind in _retried(told)
        if reason.kind == "memory":
            goes_on = _halve_passes(told, folder)
        if share().world > 1:
            raise Failure(reason.words, reason.kind)
        if not goes_on or begun > told.retries:
            break
        parts = f" in passes of {_passes(told, folder)} clips" if reason.kind == "memory" else ""
        trial.say(f"{reason.words}; going on from the last checkpoint{parts}")
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


def _attempt(trial: _Trial, report: Report, wished: Callable[[], Wish]) -> Reason | None:
    """Train, or test, to the end; returns what kept it from that."""
    told, folder, copies = trial.told, trial.folder, trial.copies
    settings = build(told.settings)
    execution = Execution(
        device=trial.device,
        loader_processes=told.loader_processes,
        max_clips_per_pass=_passes(told, folder),
        recompute=told.recompute_activations,
        compile=told.compile,
        checkpoint_every_steps=told.checkpoint_every_steps,
        keep=Keep(**told.keep),
        stored=copies.stored if copies else lambda path: None,
        say=trial.say,
    )
    try:
        with Watch(told, settings.recipe.batch_size, trial.device, trial.say, wished) as watch:
            execution = replace(
                execution,
                step=watch.step,
                alive=watch.alive,
                try_again=_WaitingForRoom(trial, watch.alive),
            )
            with _alone_in(trial, watch.alive) if share().rank == 0 else nullcontext():
                if told.trained:
                    test_again(settings, _result_of(told), folder, report, execution)
                else:
                    for name in copies.ready() if copies else ():
                        trial.say.note(f"{name} fetched from {told.remote}")
                    fit(settings, folder, report, execution)
                if copies:
                    copies.finished()
    except Stopped as words:
        reason = Reason(str(words), "stopped")
    except Exception as error:
        reason = reason_of(error)
        trial.say.note(traceback.format_exc())
        if reason.kind == "code":
            trial.say(traceback.format_exc())
    else:
        return None
    return _left(folder, reason)


def _copies(told: Assignment, folder: Path) -> AbstractContextManager[Copies | None]:
    return (
        Copies(remote(told.remote), told.key, folder, Path(told.stop_file))
        if told.remote
        else nullcontext()
    )


def _result_of(told: Assignment) -> Path:
    """Return the result folder that is to be tested again; brings it here where another node trained it."""
    result = Path(told.trained or "")
    if told.remote:
        remote(told.remote).pull_sealed(f"trials/{result.parent.name}/{result.name}", result)
    return result


def _retried(told: Assignment) -> frozenset[FailureKind]:
    numbers: frozenset[FailureKind] = frozenset({"numbers"})
    return RETRIED | numbers if told.retry_numbers else RETRIED


def _left(folder: Path, reason: Reason) -> Reason:
    """Leave the reason in the trial's folder; that a worker lost its peer is no news where the peer has left its own."""
    if reason.kind != "node" or read_reason(folder) is None:
        with suppress(OSError):  # on a full disk even the words do not fit
            write_reason(folder, reason)
    return reason


def _heed_earlier(told: Assignment, folder: Path, copies: Copies | None) -> None:
    """Give a trial up at once that failed in a way that would come again; forget any other failure.

    Raises:
        Failure: so did the attempt before this one, and Ray tries again all the same.
    """
    reason = read_reason(folder) if share().world > 1 else None
    if reason and reason.kind not in _retried(told) | {"stopped"}:
        raise Failure(reason.words, reason.kind)
    if share().rank == 0:
        (folder / FILE).unlink(missing_ok=True)
        if copies:
            copies.place.remove(f"{copies.name}/{FILE}")


def _passes(told: Assignment, folder: Path) -> int | None:
    """Return the largest pass: what was asked for, or less after it was too much."""
    with suppress(OSError, ValueError, KeyError):
        return int(read_json(folder / PASSES)["max_clips_per_pass"])
    return told.max_clips_per_pass


def _halve_passes(told: Assignment, folder: Path) -> bool:
    """Note that passes are to be half as large; false where they cannot be."""
    share_of_batch = build(told.settings).recipe.batch_size // share().world
    now = min(_passes(told, folder) or share_of_batch, share_of_batch)
    if now < 4:  # clips come in pairs, to be mixed
        return False
    write_text(folder / PASSES, json.dumps({"max_clips_per_pass": now // 4 * 2}))
    return True


class _WaitingForRoom:
    """Waits for a disk that is full to have room again: others write there too, and remove what they wrote."""

    def __init__(self, trial: _Trial, alive: Callable[[], None]) -> None:
        self.trial, self.alive = trial, alive
        self.refused: tuple[str, float] | None = None
        """The words of the first refusal of one write, and when."""

    def __call__(self, failure: Failure) -> bool:
        """Wait a little; false when it has been long enough, or somebody stops the study."""
        told, words = (
            self.trial.told,
            str(failure).partition(" (")[0],
        )  # what follows is how much is free
        now = time.monotonic()
        if "the disk is full" not in words:
            return False
        if self.refused is None or self.refused[0] != words:
            self.refused = (words, now)
            self.trial.say(f"{words}: waiting up to {told.patience_s:g} s for room")
        if now - self.refused[1] > told.patience_s or Path(told.stop_file).exists():
            return False
        self.alive()
        time.sleep(min(_LOOKS_S, told.patience_s / 4))
        return True


@contextmanager
def _alone_in(trial: _Trial, alive: Callable[[], None]) -> Generator[None]:
    """Hold the trial's folder; wait while another study, or a worker that outlives its launch for seconds, trains there.

    Raises:
        Stopped: somebody stopped the study while it waited.
    """
    told, folder = trial.told, trial.folder
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
        if Path(told.stop_file).exists():
            raise Stopped(f"stopped while it waited for {_holder(folder)}")
    with lock, _named_holder(told, folder):
        yield


@contextmanager
def _named_holder(told: Assignment, folder: Path) -> Generator[None]:
    words = f"the study {Path(told.stop_file).stem} (process {os.getpid()} on {platform.node()})"
    with suppress(OSError):  # on a full disk the training has more to say
        write_text(folder / HOLDER, words)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)


def _holder(folder: Path) -> str:
    with suppress(OSError):
        return (folder / HOLDER).read_text(encoding="utf-8")
    return "another process"
