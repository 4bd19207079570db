"""The plain backend: one trial after the other, in this process, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mar.errors import Failure, UserError
from orchestration.config import LaunchConfig
from orchestration.study import Trial
from orchestration.trial import Listener, assign
from orchestration.worker import train


def run(trials: Sequence[Trial], launch: LaunchConfig, listener: Listener) -> None:
    """Train the trials in order; one that fails does not stop the next.

    Raises:
        UserError: more than one worker asked for.
    """
    if launch.workers > 1:
        raise UserError("--local trains with one worker; leave out --local to use --workers")
    for trial in trials:
        listener.started(trial.key)

        def report(epoch: int, metrics: dict[str, float], _: Path | None, key: str = trial.key) -> None:
            listener.epoch(key, epoch, metrics)

        try:
            train(assign(trial, launch, 0).plain(), report)
        except (UserError, Failure) as error:
            listener.failed(trial.key, str(error))
        else:
            listener.finished(trial.key)
