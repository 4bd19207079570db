"""What runs where the training is: on a Ray Train worker, in Tune's trial, or here."""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mar.checkpoint import write_text
from mar.errors import Failure, Stopped
from mar.parallel import default_device, share
from mar.settings import build
from mar.train import Execution, Report, fit, test_again
from orchestration.failures import FILE, RETRIED, Reason, read_reason, reason_of, write_reason
from orchestration.trial import LOG, PASSES, Assignment
from orchestration.watch import Watch

_PREDECESSOR_S = 20.0


def train(
    assignment: dict[str, Any], report: Report, is_preempted: Callable[[], bool] = lambda: False
) -> Reason | None:
    """Train one trial in this process (as one of several, if a process group is up).

    Returns why it was given up, or none when it is finished. What would come again is returned and not raised, so that
    nobody tries again; the reason is in the trial's folder too. Out of memory, it goes on from its last checkpoint in
    passes of half as many clips. With several workers a reason is raised, or the others would wait for this one.
    """
    told = Assignment(**assignment)
    folder = Path(told.folder)
    torch.set_num_threads(told.cpus_per_worker)
    leads, device = share().rank == 0, default_device() if told.gpus_per_worker else torch.device("cpu")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"{folder} cannot be made: {error}; choose another --store", "disk") from None
    say = _Log(folder) if leads else _say_nothing
    _heed_earlier(folder, leads)
    if share().world == 1 and Path(told.stop_file).exists():
        return _left(folder, Reason("stopped before it began", "stopped"))
    reason: Reason | None = None
    for tries_left in range(told.retries, -1, -1):
        reason = _attempt(told, folder, device, say, report, is_preempted)
        if reason is None or reason.kind == "stopped":
            break
        goes_on = reason.kind == "memory" and _halve_passes(told, folder)
        if share().world > 1:
            raise Failure(reason.words, reason.kind)
        if not goes_on or not tries_left:
            break
        say(f"{reason.words}; going on from the last checkpoint in passes of {_passes(told, folder)} clips")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return reason


def _attempt(
    told: Assignment,
    folder: Path,
    device: torch.device,
    say: Callable[[str], None],
    report: Report,
    is_preempted: Callable[[], bool],
) -> Reason | None:
    """Train, or test, to the end; returns what kept it from that."""
    execution = Execution(
        device=device,
        loader_processes=told.loader_processes,
        max_clips_per_pass=_passes(told, folder),
        checkpoint_every_steps=told.checkpoint_every_steps,
        say=say,
    )
    leads, settings = share().rank == 0, build(told.settings)
    try:
        with Watch(folder, Path(told.stop_file), device, told.hang_timeout_s, is_preempted) as watch:
            execution = replace(execution, step=watch.step, alive=watch.alive)
            with _alone_in(folder) if leads else nullcontext():
                if told.trained:
                    test_again(settings, Path(told.trained), folder, report, execution)
                else:
                    fit(settings, folder, report, execution)
    except Stopped as words:
        reason = Reason(str(words), "stopped")
    except Exception as error:
        reason = reason_of(error)
        if reason.kind == "code":
            say(traceback.format_exc())
    else:
        return None
    return _left(folder, reason)


def _left(folder: Path, reason: Reason) -> Reason:
    """Leave the reason in the trial's folder; that a worker lost its peer is no news where the peer has left its own."""
    if reason.kind != "node" or read_reason(folder) is None:
        with suppress(OSError):  # on a full disk even the words do not fit
            write_reason(folder, reason)
    return reason


def _heed_earlier(folder: Path, leads: bool) -> None:
    """Give a trial up at once that failed in a way that would come again; forget any other failure.

    Raises:
        Failure: so did the attempt before this one, and Ray tries again all the same.
    """
    reason = read_reason(folder) if share().world > 1 else None
    if reason and reason.kind not in RETRIED | {"stopped"}:
        raise Failure(reason.words, reason.kind)
    if leads:
        (folder / FILE).unlink(missing_ok=True)


def _passes(told: Assignment, folder: Path) -> int | None:
    """Return the largest pass: what was asked for, or less after it was too much."""
    with suppress(OSError, ValueError, KeyError):
        return int(json.loads((folder / PASSES).read_text(encoding="utf-8"))["max_clips_per_pass"])
    return told.max_clips_per_pass


def _halve_passes(told: Assignment, folder: Path) -> bool:
    """Note that passes are to be half as large; false where they cannot be."""
    share_of_batch = build(told.settings).recipe.batch_size // share().world
    now = min(_passes(told, folder) or share_of_batch, share_of_batch)
    if now < 4:  # clips come in pairs, to be mixed
        return False
    write_text(folder / PASSES, json.dumps({"max_clips_per_pass": now // 4 * 2}))
    return True


def _say_nothing(words: str) -> None:
    pass


class _Log:
    """Messages for a person, in the trial's folder: the launch reads them from there (Ray keeps what is printed)."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOG

    def __call__(self, words: str) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{words}\n")


@contextmanager
def _alone_in(folder: Path) -> Generator[None]:
    """Hold the trial's folder: a worker of a killed launch may live some seconds longer than its driver."""
    try:
        with FileLock(folder / "lock", timeout=_PREDECESSOR_S):
            yield
    except Timeout:
        raise Failure(
            f"{folder} is being trained by another process: wait for that study, then run this again", "user"
        ) from None


def train_worker(assignment: dict[str, Any]) -> None:
    """Train as one of a TorchTrainer's workers; all of them report, Ray listens to the first."""
    from ray import train as ray_train

    def report(epoch: int, metrics: dict[str, float], _: Path | None) -> None:
        ray_train.report({**metrics, "epoch": epoch})

    train(assignment, report, lambda: ray_train.get_preemption_info() is not None)
