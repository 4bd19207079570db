"""The specification of a trial for its workers, which may be on other machines; sent as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from mar.config.input_settings import AUTO_CACHE
from mar.data.cache_index import cache_folder
from orchestration.config import LaunchConfig, WorkerConfig
from orchestration.storage.trial_dir import TrialDir
from orchestration.studies.identity import key_of, stable_identity
from orchestration.studies.recipe import absolute_paths
from orchestration.studies.trial import Trial

# JSON has no paths: these fields are sent as text.
_PATHS = ("folder", "stop_file", "trained", "frames", "stable", "tokens")


@dataclass(frozen=True)
class TrialSpec:
    """One trial, in the form that its workers receive."""

    key: str
    settings: dict[str, Any]
    """The complete settings, as JSON values: the worker builds and checks them again."""
    folder: Path
    worker: WorkerConfig
    gpus_per_worker: float
    """``worker.gpus_per_worker``, decided for the cluster that runs the trial."""
    stop_file: Path
    """While this file exists, the trial is to save and stop."""
    environment: dict[str, str]
    """Variables that Ray Train reads in the trial's own process: on a cluster that process does not
    inherit the launch's environment."""
    waits_for_nodes: bool
    """Whether a lost node may be replaced: on a cluster, not on this machine."""
    storage: str
    """Ray Train's own folder."""
    divides_batch: bool = True
    """Whether a trial that runs out of memory divides its batch; else the launch starts it again
    with a larger share of the GPU."""
    trained: Path | None = None
    """The result folder of a training that is only to be tested; none: train."""
    frames: Path | None = None
    """The frame cache that ``data.cache: auto`` stands for; the worker packs what is missing."""
    stable: Path | None = None
    """The folder that trainings of other lengths share with this one (``warmup_stable_decay``)."""
    tokens: Path | None = None
    """The folder of the tokens of frozen encoders (``encoder.cached``)."""

    @property
    def shares_gpu(self) -> bool:
        """Whether other trials' workers may be on the same GPU."""
        return 0 < self.gpus_per_worker < 1

    @property
    def trial_dir(self) -> TrialDir:
        """The trial's folder."""
        return TrialDir(self.folder)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, from which ``from_json`` makes an equal spec."""
        # ``asdict`` also converts the nested WorkerConfig.
        values = asdict(self)
        for name in _PATHS:
            if values[name] is not None:
                values[name] = str(values[name])
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the spec that ``to_json`` made the values from."""
        own: dict[str, Any] = dict(values)
        for name in _PATHS:
            if own[name] is not None:
                own[name] = Path(own[name])
        own["worker"] = WorkerConfig.from_json(own["worker"])
        return cls(**own)


def build_trial_spec(
    trial: Trial,
    launch: LaunchConfig,
    gpus_per_worker: float,
    trained: Path | None = None,
    environment: Mapping[str, str] | None = None,
    divides_batch: bool = True,
) -> TrialSpec:
    """Return the specification of a trial for its workers.

    ``trained`` is the result folder of a finished training that is only to be tested.
    """
    # A worker has another working directory, where relative paths would not be found.
    settings = absolute_paths(trial.settings)
    frames = None
    if settings.data.cache == AUTO_CACHE:
        frames = cache_folder(settings.data, launch.frames_root)
        data = settings.data.model_copy(update={"cache": str(frames)})
        settings = settings.model_copy(update={"data": data})
    return TrialSpec(
        key=trial.key,
        settings=settings.model_dump(mode="json"),
        folder=launch.trial_folder(trial.key),
        worker=launch.worker,
        gpus_per_worker=gpus_per_worker,
        stop_file=launch.stop_file,
        environment=dict(environment or {}),
        waits_for_nodes=launch.address is not None,
        # Absolute for the same reason.
        storage=str(launch.store.resolve() / "ray"),
        divides_batch=divides_batch,
        trained=trained,
        frames=frames,
        stable=stable_folder(trial, launch),
        tokens=launch.tokens_root,
    )


def stable_folder(trial: Trial, launch: LaunchConfig) -> Path | None:
    """Return the folder that trainings of other lengths share with a trial; None if they cannot."""
    # What is shared is on one disk, and other nodes do not have it.
    if launch.worker.object_store:
        return None
    shared = stable_identity(trial.identity)
    return launch.stable_root / key_of(shared) if shared else None
