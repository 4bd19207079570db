"""Checks the data and the pre-trained weights before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from mar.data.annotations import read_split
from mar.errors import UserError
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
