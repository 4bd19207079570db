"""What is checked before anything is trained: the data, and the pre-trained weights."""

from __future__ import annotations

from collections.abc import Sequence

from mar.data.annotations import read_split
from mar.errors import UserError
from orchestration.studies.trial import ABSENT, Trial


def check_data(trials: Sequence[Trial], only_present: bool = False) -> None:
    """Read the annotations of the trials' data, each set once; ``only_present`` passes over sets that are not there.

    Raises:
        UserError: a set is not there, a line of it is wrong, or it is smaller than a batch.
    """
    sizes: dict[str, int] = {}
    for trial in trials:
        data, batch_size = trial.settings.data, trial.settings.videos_per_batch
        if only_present and trial.fingerprint == ABSENT:
            continue
        name = data.model_dump_json()
        if name not in sizes:
            read_split(data, "val")
            sizes[name] = len(read_split(data, "train"))
        if batch_size > sizes[name]:
            raise UserError(
                f"recipe.batch_size: {batch_size} is more than the {sizes[name]} training videos ({trial.name})"
            )


def check_weights(trials: Sequence[Trial]) -> None:
    """See that each model fits the weights it is to start from, each pair once.

    Raises:
        UserError: one does not.
    """
    pairs = {
        trial.settings.model_dump_json(): trial
        for trial in trials
        if trial.settings.encoder.weights
    }
    checked: set[str] = set()
    for trial in pairs.values():
        model = trial.settings.model_dump_json(
            include={"clip", "encoder", "classifier", "reconstruction", "mask"}
        )
        if model not in checked:
            from mar.weights.pretrained import (
                check_start,
            )  # torch, which only a study with weights needs here

            check_start(trial.settings)
            checked.add(model)
