"""All that a worker needs to train a trial, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestration.config import LaunchConfig
from orchestration.studies.recipe import absolute_paths
from orchestration.studies.trial import Trial


@dataclass(frozen=True)
class TrialSpec:
    """All that a worker on any machine needs: plain values, so that it travels as a dictionary."""

    key: str
    settings: dict[str, Any]
    folder: str
    workers: int
    min_workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    loader_processes: int
    max_microbatch_clips: int | None
    activation_checkpointing: bool
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


def build_trial_spec(
    trial: Trial,
    launch: LaunchConfig,
    gpus_per_worker: int,
    trained: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> TrialSpec:
    """Return what a worker is told of a trial."""
    return TrialSpec(
        key=trial.key,
        settings=absolute_paths(trial.settings).model_dump(mode="json"),
        folder=str(launch.trial_folder(trial.key)),
        workers=launch.workers,
        min_workers=launch.min_workers or launch.workers,
        cpus_per_worker=launch.cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        loader_processes=launch.loader_processes,
        max_microbatch_clips=launch.max_microbatch_clips,
        activation_checkpointing=launch.activation_checkpointing,
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
        environment=dict(environment or {}),
        waits_for_nodes=launch.address is not None,
        storage=str(launch.store.resolve() / "ray"),
        trained=str(trained) if trained else None,
    )
