"""What runs where the training is: on a Ray Train worker, in Tune's trial, or here."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mar.checkpoint import write_text
from mar.errors import Failure, UserError
from mar.parallel import default_device, share
from mar.settings import build
from mar.train import Execution, Report, fit, test_again
from orchestration.trial import FAILURE, LOG, Assignment

_PREDECESSOR_S = 20.0


def train(assignment: dict[str, Any], report: Report) -> str | None:
    """Train one trial in this process (as one of several, if a process group is up).

    Returns why it was given up, or none when it is finished. A mistake or a failure that would come again is
    returned and not raised, so that nobody tries again; it is in the trial's folder too. With several workers it
    is raised, or the others would wait for this one.
    """
    told = Assignment(**assignment)
    folder = Path(told.folder)
    torch.set_num_threads(told.cpus_per_worker)
    leads = share().rank == 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"{folder} cannot be made: {error}; choose another --store") from None
    execution = Execution(
        device=default_device() if told.gpus_per_worker else torch.device("cpu"),
        loader_processes=told.loader_processes,
        max_clips_per_pass=told.max_clips_per_pass,
        checkpoint_every_steps=told.checkpoint_every_steps,
        say=_Log(folder) if leads else (lambda _: None),
    )
    try:
        with _alone_in(folder) if leads else nullcontext():
            if told.trained:
                test_again(build(told.settings), Path(told.trained), folder, report, execution)
            else:
                fit(build(told.settings), folder, report, execution)
    except (UserError, Failure) as error:
        with suppress(OSError):  # on a full disk even the words do not fit
            write_text(folder / FAILURE, str(error))
        if share().world > 1:
            raise
        return str(error)
    return None


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
            f"{folder} is being trained by another process: wait for that study, then run this again"
        ) from None


def train_worker(assignment: dict[str, Any]) -> None:
    """Train as one of a TorchTrainer's workers; all of them report, Ray listens to the first."""
    from ray import train as ray_train

    def report(epoch: int, metrics: dict[str, float], _: Path | None) -> None:
        ray_train.report({**metrics, "epoch": epoch})

    train(assignment, report)
