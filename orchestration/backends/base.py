"""One trial: what a backend is told about it, and Tune's trial that trains it in its own process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestration.config import LaunchConfig
from orchestration.failures import Reason
from orchestration.studies.loader import Trial, absolute_paths

LOG = "log.txt"
"""File, below the trial's folder, with what its workers had to say to a person."""
LOGS = "logs"
"""Folder, below the trial's folder, with a log of each worker: what it ran on, warnings, tracebacks, stacks."""
PULSE = "pulse.json"
"""File, below the trial's folder: how far its training is, for ``mar status``."""
ATTEMPTS = "attempts.json"
"""File, below the trial's folder: how often this launch has begun to train it, in whatever process."""
CLEARED = "clearing.json"
"""File, below the trial's folder, while the checkpoints of its training are to go: which of them stay for good."""
HOLDER = "holder.txt"
"""File, below the trial's folder: who trains it now, for whoever waits for that."""
RECORD = "trial.json"
"""File, below the trial's folder: its study, name and tags, from which a lost database is made again."""
PASSES = "passes.json"
"""File, below the trial's folder, with the largest pass that its memory holds, once it held no larger."""


@dataclass(frozen=True)
class Assignment:
    """All that a worker on any machine needs: plain values, so that it travels as a dictionary."""

    key: str
    settings: dict[str, Any]
    folder: str
    workers: int
    min_workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    loader_processes: int
    max_clips_per_pass: int | None
    recompute_activations: bool
    compile: bool
    checkpoint_every_steps: int | None
    keep: dict[str, Any]
    retries: int
    retry_numbers: bool
    resize_s: float
    remote: str | None
    cache_from: str | None
    stop_file: str
    hang_timeout_s: float | None
    patience_s: float
    environment: dict[str, str]
    """What Ray Train reads in the trial's own process, which no environment of the launch reaches on a cluster."""
    waits_for_nodes: bool
    storage: str
    trained: str | None = None
    """The result folder of a training that is to be tested again; none: train."""

    def plain(self) -> dict[str, Any]:
        """Return it as a dictionary."""
        return asdict(self)


Trained = Mapping[str, Path]
"""Trials that are to be tested, not trained: key -> the result folder of their training."""


class Source(Protocol):
    """What proposes trials one by one; ``search.Proposer`` does."""

    def next(self) -> Trial | None:
        """Return the next trial to train; none: there are enough."""
        ...

    def should_end(self, key: str, epoch: int, metrics: dict[str, float]) -> bool:
        """Whether a trial is to be ended at this epoch."""
        ...


class Listener(Protocol):
    """What a launch wants to hear from the backend that trains its trials."""

    def started(self, key: str) -> None:
        """A trial runs."""

    def epoch(self, key: str, epoch: int, metrics: dict[str, float]) -> None:
        """A trial finished an epoch (or tells of an earlier one again)."""

    def finished(self, key: str) -> None:
        """A trial is done: its result folder is complete."""

    def failed(self, key: str, reason: Reason) -> None:
        """A trial was given up."""

    def is_over(self) -> bool:
        """Whether no other trial is to begin."""
        ...


def assign(trial: Trial, launch: LaunchConfig, gpus_per_worker: int, trained: Path | None = None) -> Assignment:
    """Return what a worker is told of a trial."""
    return Assignment(
        key=trial.key,
        settings=absolute_paths(trial.settings).model_dump(mode="json"),
        folder=str(launch.trial_folder(trial.key)),
        workers=launch.workers,
        min_workers=launch.min_workers or launch.workers,
        cpus_per_worker=launch.cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        loader_processes=launch.loader_processes,
        max_clips_per_pass=launch.max_clips_per_pass,
        recompute_activations=launch.recompute_activations,
        compile=launch.compile,
        checkpoint_every_steps=launch.checkpoint_every_steps,
        keep=asdict(launch.keep),
        retries=launch.retries,
        retry_numbers=launch.retry_numbers,
        resize_s=launch.resize_s,
        remote=launch.remote,
        cache_from=launch.cache_from,
        stop_file=str(launch.stop_file),
        hang_timeout_s=launch.hang_timeout_s,
        patience_s=launch.patience_s,
        environment=quiet_environment(launch),
        waits_for_nodes=launch.address is not None,
        storage=str(launch.store.resolve() / "ray"),
        trained=str(trained) if trained else None,
    )


EARLIER = "earlier"
"""In a report to Ray: what was reported before this trial went on from a checkpoint, an epoch each."""


def one_by_one(send: Callable[[dict[str, Any]], None]) -> Callable[[int, dict[str, float], Path | None], None]:
    """Return a report function that sends each epoch as it ends, and those of earlier attempts along with the first.

    Ray answers a report when it next looks, so a hundred of them in a row would take a minute.
    """
    earlier: list[dict[str, Any]] = []

    def report(epoch: int, metrics: dict[str, float], checkpoint: Path | None) -> None:
        if checkpoint is None:
            if epoch == 1:  # another attempt
                earlier.clear()
            earlier.append({**metrics, "epoch": epoch})
        else:
            send({**metrics, "epoch": epoch, EARLIER: [*earlier]})
            earlier.clear()

    return report


def run_inline(config: dict[str, Any]) -> None:
    """Train inside Tune's trial: one worker, no process of its own, under a second to start."""
    from ray import tune

    from orchestration.worker.trial_runner import train

    reason = train(config["assignment"], one_by_one(tune.report))
    if reason:
        tune.report(reason.plain())  # on a full disk it is in no file


def quiet_environment(launch: LaunchConfig) -> dict[str, str]:
    """Return what Ray must find in the environment, in this process and in its workers."""
    if launch.address:
        reach = {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}
    else:
        reach = {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's default on a Mac: its servers listen on loopback alone
            # Whoever is on the machine could read the metrics, without a token; nobody collects those of a private Ray.
            "RAY_enable_metrics_collection": "0",
            "AUTOSCALER_METRIC_PORT": "-1",
            "DASHBOARD_METRIC_PORT": "-1",
        }
    return {
        **reach,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(launch.poll_s),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1" if launch.address else "0",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20" if launch.min_workers else "60",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours has the trials save
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may fail before its first epoch
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
    }
