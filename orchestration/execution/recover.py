"""``mar recover``: writes runs into MLflow from the results of a store that lost its database."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mar import MANIFEST, RESULT_DIR
from mar.atomic_dir import read_atomic_dir
from mar.config.overrides import build, without_paths
from mar.config.schema import TrainingConfig
from mar.data.annotations import fingerprint
from mar.errors import Failure, UserError
from mar.evaluation.correctness import read_history
from mar.safe_input import read_json
from mar.training.reports import EpochReport
from orchestration.config import LaunchConfig
from orchestration.storage.trial_dir import TrialDir
from orchestration.studies.identity import identity, key_of
from orchestration.studies.trial import ABSENT
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store
from orchestration.tracking.tags import (
    FOLDER,
    IDENTITY,
    KEY,
    KIND,
    MODEL_LOST,
    PARENT_RUN,
    STUDY,
    TRAINED_BY,
)
from orchestration.tracking.writer import Writer

_UNKNOWN_STUDY = "recovered"
"""Name of the study for results that have no record of theirs."""


@dataclass
class Recovered:
    """The results that were found in a store."""

    names: list[str] = field(default_factory=list[str])
    """Trials whose runs were written."""
    num_known: int = 0
    """How many results the database had."""
    damaged: list[str] = field(default_factory=list[str])
    """Results that are damaged, or cannot be identified, each with the reason."""


def unrecorded(launch: LaunchConfig, known: set[str]) -> list[Path]:
    """Return the trial folders with a finished result whose key is not one of ``known``."""
    manifests = sorted((launch.store.resolve() / "trials").glob(f"*/{RESULT_DIR}/{MANIFEST}"))
    folders = [manifest.parent.parent for manifest in manifests]
    return [folder for folder in folders if folder.name not in known]


def finished_here(launch: LaunchConfig, keys: Iterable[str]) -> list[RunRecord]:
    """Return records of finished trials from the store's folders, for a table without MLflow."""
    found: list[RunRecord] = []
    for key in keys:
        folder = launch.trial_folder(key)
        # A result that is missing or damaged is a missing row of the table, no more.
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, Failure):
            metrics = read_atomic_dir(folder / RESULT_DIR)["metrics"]
            record = read_json(TrialDir(folder).record)
            tags = {**record["tags"], KEY: key}
            found.append(RunRecord(key, record["study"], "", "FINISHED", metrics, tags))
    return found


def recover(launch: LaunchConfig) -> Recovered:
    """Write a run for each finished result that the store's database does not have.

    Raises:
        UserError: there is no such store.
        Failure: the tracking store cannot be used.
    """
    if not (launch.store / "trials").is_dir():
        raise UserError(f"--store {launch.store}: there are no trials in it")
    store = Store(launch)
    known = {record.key for record in store.trials() if record.status == "FINISHED"}
    everything = unrecorded(launch, set())
    found = Recovered(num_known=sum(folder.name in known for folder in everything))
    writer = Writer(store)
    try:
        for folder in unrecorded(launch, known):
            # One damaged result must not keep the others from being recovered.
            try:
                manifest = read_atomic_dir(folder / RESULT_DIR)
                settings = build(manifest["settings"])
                record = _record(folder, settings)
            except (Failure, UserError) as reason:
                found.damaged.append(f"{folder / RESULT_DIR}: {reason}")
                continue
            found.names.append(
                _write_run(store, writer, folder, settings, manifest["metrics"], record)
            )
    finally:
        writer.close()
    return found


def _write_run(
    store: Store,
    writer: Writer,
    folder: Path,
    settings: TrainingConfig,
    reached: dict[str, float],
    record: dict[str, Any],
) -> str:
    """Write one trial's run as its study would have written it, and return the trial's name."""
    key = folder.name
    study = str(record["study"])
    experiment = store.experiment(study)
    # Several trials of a study share its run: it is found again after the first.
    parent = store.run(experiment, study, {KIND: "study"}, {STUDY: study})
    # The record has neither the parent's id nor, if the store was moved, the right folder.
    tags = {**record["tags"], STUDY: study, PARENT_RUN: parent, FOLDER: str(folder)}
    # A result may come without its model (benchmarks/archive_results.py): nothing can be tested
    # with it, so the run says so.
    is_model_here = (folder / RESULT_DIR / "model.safetensors").is_file()
    if TRAINED_BY not in tags and not is_model_here:
        tags[MODEL_LOST] = "true"
    run_id = store.run(experiment, record["name"], {KIND: "trial", KEY: key}, tags)
    store.parameters(run_id, without_paths(settings))
    writer.open(key, lambda: run_id)
    for epoch, metrics in enumerate(read_history(folder / RESULT_DIR), start=1):
        writer.log_report(key, EpochReport(epoch, metrics, is_replay=True))
    # The final report adds only the test's metrics: the epochs are logged by now.
    final = {name: float(value) for name, value in reached.items()}
    writer.log_report(key, EpochReport(settings.recipe.epochs, final, is_final=True))
    # A trial that was only tested has no model of its own to register.
    has_model = TRAINED_BY not in tags and is_model_here
    writer.result(key, folder / RESULT_DIR, has_model)
    if has_model:
        writer.register(key, study, {"trial": str(record["name"])})
    writer.end(key, "FINISHED")
    writer.open(study, lambda: parent)
    writer.end(study, "FINISHED")
    return f"{record['name']} ({study})"


def _record(folder: Path, settings: TrainingConfig) -> dict[str, Any]:
    """Return the record that the trial's study wrote, or else one made from its settings.

    Raises:
        Failure: neither gives the folder's name, which is a hash of the identity: a table must not
            mix trainings.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        record = read_json(TrialDir(folder).record)
        # A record that was copied here from another trial does not give this folder's name.
        if key_of(record["tags"][IDENTITY]) == folder.name and {"study", "name"} <= record.keys():
            return record
    # Without the data no fingerprint can be made, and the identity has this value in its place.
    data = ABSENT
    with suppress(UserError):
        data = fingerprint(settings.data)
    line = identity(settings, data)
    if key_of(line) != folder.name:
        raise Failure(
            "its settings cannot be identified: its data is missing, or another version of mar "
            "trained it"
        )
    return {"study": _UNKNOWN_STUDY, "name": folder.name, "tags": {IDENTITY: line}}
