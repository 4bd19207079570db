"""The plain backend: one trial after the other, in this process, without Ray."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from mar.errors import UserError
from orchestration.config import LaunchConfig
from orchestration.study import Trial
from orchestration.trial import LOG, Listener, Trained, assign
from orchestration.worker import train


def run(trials: Sequence[Trial], launch: LaunchConfig, listener: Listener, trained: Trained) -> None:
    """Train (or test) the trials in order; one that fails does not stop the next.

    Raises:
        UserError: more than one worker asked for.
    """
    if launch.workers > 1:
        raise UserError("--local trains with one worker; leave out --local to use --workers")
    gpus = int(torch.cuda.is_available()) if launch.gpus_per_worker is None else launch.gpus_per_worker
    for trial in trials:
        listener.started(trial.key)

        def report(epoch: int, metrics: dict[str, float], _: Path | None, key: str = trial.key) -> None:
            listener.epoch(key, epoch, metrics)

        try:
            reason = train(assign(trial, launch, gpus, trained.get(trial.key)).plain(), report)
        except Exception as error:  # a fault of ours or of the settings: the next trial may do better
            (launch.trial_folder(trial.key) / LOG).write_text(traceback.format_exc(), encoding="utf-8")
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            listener.finished(trial.key)
        else:
            listener.failed(trial.key, reason)
