"""What runs where the training is: on a Ray Train worker, in Tune's trial, or here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mar.checkpoint import write_text
from mar.config import build
from mar.errors import Failure, UserError
from mar.parallel import default_device, share
from mar.train import Execution, Report, fit
from orchestration.trial import FAILURE, Assignment


def train(assignment: dict[str, Any], report: Report) -> None:
    """Train one trial in this process (as one of several, if a process group is up)."""
    told = Assignment(**assignment)
    folder = Path(told.folder)
    torch.set_num_threads(told.cpus_per_worker)
    folder.mkdir(parents=True, exist_ok=True)
    leads = share().rank == 0
    execution = Execution(
        device=default_device(),
        loader_processes=told.loader_processes,
        max_clips_per_pass=told.max_clips_per_pass,
        checkpoint_every_steps=told.checkpoint_every_steps,
        say=(lambda words: print(f"{told.name}: {words}", flush=True)) if leads else (lambda _: None),
    )
    if leads:
        (folder / FAILURE).unlink(missing_ok=True)
    try:
        fit(build(told.settings), folder, report, execution)
    except (UserError, Failure) as error:
        write_text(folder / FAILURE, str(error))
        raise


def train_worker(assignment: dict[str, Any]) -> None:
    """Train as one of a TorchTrainer's workers; all of them report, Ray listens to the first."""
    from ray import train as ray_train

    def report(epoch: int, metrics: dict[str, float], _: Path | None) -> None:
        ray_train.report({**metrics, "epoch": epoch})

    train(assignment, report)
