"""Says which trials continue shorter trainings, and why others cannot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mar.config.schedule import stable_epochs
from mar.safe_input import read_json
from orchestration.config import LaunchConfig
from orchestration.studies.trial import Trial
from orchestration.tracking.run_record import RunRecord
from orchestration.worker.spec import stable_folder


def prolonging_notes(
    trials: Sequence[Trial], records: Sequence[RunRecord], launch: LaunchConfig
) -> list[str]:
    """Return a line for each trial that is another length of a training that was finished."""
    # Without a trial to run, a store of thousands of runs need not be read.
    if not trials:
        return []
    finished = _lengths(records)
    notes: list[str] = []
    for trial in trials:
        others = finished.get(_divided(trial.identity)[0], set())
        shorter = [each for each in others if each < trial.settings.recipe.epochs]
        begun = _shared_epochs(trial, launch)
        if begun:
            notes.append(f"{trial.name}: continues after epoch {begun} of a shorter training")
        elif shorter and trial.settings.recipe.schedule == "cosine":
            notes.append(
                f"{trial.name}: cannot continue the finished training of {max(shorter)} epochs: a "
                "cosine's rate depends on their number from the first step on. "
                "recipe.schedule=warmup_stable_decay can be prolonged"
            )
    return notes


def _shared_epochs(trial: Trial, launch: LaunchConfig) -> int:
    """Return the epochs of other lengths' stable parts that a trial begins with; 0: none."""
    folder = stable_folder(trial, launch)
    if folder is None or launch.trial_folder(trial.key).is_dir():
        return 0
    lengths = [0]
    for manifest in folder.glob("step_*/manifest.json"):
        try:
            lengths.append(len(read_json(manifest)["progress"]["history"]))
        except (OSError, ValueError, KeyError, TypeError):
            # The training passes over a damaged one too.
            continue
    return max(each for each in lengths if each <= stable_epochs(trial.settings.recipe))


def _lengths(records: Sequence[RunRecord]) -> dict[str, set[int]]:
    """Map each finished training, without its number of epochs, to the numbers that there are."""
    lengths: dict[str, set[int]] = {}
    for record in records:
        if record.status != "FINISHED":
            continue
        try:
            rest, epochs = _divided(record.identity)
            lengths.setdefault(rest, set()).add(epochs)
        # A run of an earlier version may lack them.
        except (ValueError, KeyError, TypeError):
            continue
    return lengths


def _divided(identity_line: str) -> tuple[str, int]:
    """Return an identity without the number of epochs, and that number."""
    tree: dict[str, Any] = json.loads(identity_line)
    epochs = int(tree["recipe"].pop("epochs"))
    return json.dumps(tree, sort_keys=True), epochs
