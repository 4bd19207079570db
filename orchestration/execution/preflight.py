"""Checks the data and the pre-trained weights before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from mar.config.input_settings import AUTO_CACHE, DataConfig
from mar.data.annotations import read_split
from mar.data.auto_cache import CachePlan, ensure_packed, plan_cache, refuse_if_too_large
from mar.data.cache_index import cache_folder
from mar.errors import UserError
from orchestration.config import LaunchConfig
from orchestration.execution.progress_bar import progress_bar
from orchestration.installation import usable_cores
from orchestration.studies.trial import ABSENT, Trial


def check_data(trials: Sequence[Trial], only_present: bool = False) -> None:
    """Read the annotations of the trials' data, each data set once.

    ``only_present`` skips data sets that are missing.

    Raises:
        UserError: a data set is missing, a line of it is wrong, or it is smaller than a batch.
    """
    num_training_videos: dict[str, int] = {}
    for trial in trials:
        if only_present and trial.fingerprint == ABSENT:
            continue
        data = trial.settings.data
        batch_size = trial.settings.videos_per_batch
        name = data.model_dump_json()
        # Reading the lists of a large data set takes seconds, and all trials may share it.
        if name not in num_training_videos:
            read_split(data, "val")
            num_training_videos[name] = len(read_split(data, "train"))
        available = num_training_videos[name]
        if batch_size > available:
            raise UserError(
                f"recipe.batch_size: {batch_size} is more than the {available} training videos "
                f"({trial.name})"
            )


def pack_frames(trials: Sequence[Trial], launch: LaunchConfig) -> None:
    """Pack the videos of trials with ``data.cache: auto`` into the store, each data set once.

    Only for a launch whose trials run on this machine: on a cluster each node packs its own, on
    its own disk, when its first trial starts.

    Raises:
        UserError: the frames do not fit on the disk.
        Failure: the disk refuses.
    """
    if launch.address is not None:
        return
    for data, plan in frames_to_pack(trials, launch).items():
        refuse_if_too_large(plan)
        print(f"packing frames: {plan.text}; all trials read them there", flush=True)
        with progress_bar("videos") as advance:
            ensure_packed(data, plan.folder, usable_cores(), advance, lambda: None)


def frames_to_pack(trials: Sequence[Trial], launch: LaunchConfig) -> dict[DataConfig, CachePlan]:
    """Return the data sets with ``data.cache: auto`` of which videos are not packed yet.

    Data sets that are missing are left out.
    """
    plans: dict[DataConfig, CachePlan] = {}
    for trial in trials:
        data = trial.settings.data
        if data.cache != AUTO_CACHE or data in plans or trial.fingerprint == ABSENT:
            continue
        plans[data] = plan_cache(data, cache_folder(data, launch.frames_root))
    return {data: plan for data, plan in plans.items() if plan.num_missing}


def check_weights(trials: Sequence[Trial]) -> None:
    """Check that each model fits the weights it starts from, each pair once.

    Raises:
        UserError: a model does not fit.
    """
    # Trials that differ in other settings have the same model: one check serves them all.
    parts_of_a_model = {"clip", "encoder", "classifier", "reconstruction", "mask"}
    checked: set[str] = set()
    for trial in trials:
        if not trial.settings.encoder.weights:
            continue
        model = trial.settings.model_dump_json(include=parts_of_a_model)
        if model in checked:
            continue
        # Loads PyTorch, which only a study with weights needs in the launch's process.
        from mar.weights.pretrained import check_start

        check_start(trial.settings)
        checked.add(model)
