"""What a trial's run in MLflow is made from: its tags, and a record of them beside the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress

from mar.atomic_dir import atomic_write
from mar.config.overrides import PATH_SETTINGS
from mar.model.flops import cost
from mar.safe_text import markdown
from orchestration.storage.trial_dir import TrialDir
from orchestration.studies.trial import Trial
from orchestration.tracking.tags import (
    COST_GFLOPS,
    COST_PARAMS_M,
    DATA_PREFIX,
    FOLDER,
    IDENTITY,
    LABELS,
    PARENT_RUN,
    SEED,
    TRAINED_BY,
    WEIGHTS,
)


def trial_tags(
    trial: Trial,
    common_tags: Mapping[str, str],
    parent: str,
    folder: str,
    trained_by: str | None,
) -> dict[str, str]:
    """Return the tags of a trial's run.

    Args:
        trial: the trial.
        common_tags: the tags that all runs of the launch have.
        parent: the id of the study's own run.
        folder: the trial's folder in the store.
        trained_by: the key of the trial whose model is tested; none if the trial is trained.
    """
    data = trial.settings.data
    costs = cost(trial.settings)
    tags = {
        **common_tags,
        # By its identity, a later launch of any study finds the run and does not train it again.
        IDENTITY: trial.identity,
        PARENT_RUN: parent,
        "mlflow.note.content": _description(trial),
        LABELS: json.dumps(dict(trial.labels), ensure_ascii=False),
        SEED: str(trial.settings.seed),
        COST_GFLOPS: f"{costs.gflops:.4f}",
        COST_PARAMS_M: f"{costs.params_m:.4f}",
        FOLDER: folder,
    }
    if trained_by is not None:
        tags[TRAINED_BY] = trained_by
    if trial.settings.encoder.weights:
        tags[WEIGHTS] = trial.settings.encoder.weights
    # Paths are not in the identity: data may be moved. The tags record where it was.
    for name in PATH_SETTINGS:
        tags[f"{DATA_PREFIX}{name}"] = str(getattr(data, name))
    return tags


def _description(trial: Trial) -> str:
    """Return what MLflow shows above a run: what the trial is, and how its model is loaded."""
    # Labels are a user's words, and MLflow renders Markdown.
    labels = [f"- {markdown(axis)}: {markdown(label)}" for axis, label in trial.labels.items()]
    lines = [
        *labels,
        f"- seed: {trial.settings.seed}",
        "",
        'From Python: `mar.load("runs:/…")` with this run\'s id, or '
        '`mlflow.pyfunc.load_model("runs:/…/result")`.',
    ]
    return "\n".join(lines)


def write_record(trial_dir: TrialDir, study: str, name: str, tags: Mapping[str, str]) -> None:
    """Write the study, name and tags of a trial's run beside its result.

    If the database is lost, ``mar recover`` makes the run again from this file.
    """
    # The id of the parent run is meaningless in another database.
    kept = {tag: value for tag, value in tags.items() if tag != PARENT_RUN}
    record = {"study": study, "name": name, "tags": kept}
    # On a full disk the trial itself reports the disk.
    with suppress(OSError):
        trial_dir.root.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, ensure_ascii=False, indent=1)
        atomic_write(trial_dir.record, text.encode())
