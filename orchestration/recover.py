"""``mar recover``: runs in MLflow from the finished results in a store whose database was lost."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mar import MANIFEST, RESULT
from mar.annotations import fingerprint
from mar.answers import read_history
from mar.config import ExperimentConfig
from mar.errors import Failure, UserError
from mar.sealed import read_sealed
from mar.settings import build, placeless
from orchestration.config import LaunchConfig
from orchestration.study import ABSENT, identity
from orchestration.tracking import IDENTITY, KEY, KIND, PARENT_RUN, STUDY, TRAINED_BY, Store, Writer
from orchestration.trial import RECORD

_UNKNOWN_STUDY = "recovered"
"""The study of results that do not say which one they are of."""


@dataclass
class Recovered:
    """What was found in a store."""

    names: list[str] = field(default_factory=list[str])
    """Trials whose runs were written."""
    num_known: int = 0
    """Results that the database had."""
    damaged: list[str] = field(default_factory=list[str])
    """Results that are not what was written, and why."""


def unrecorded(launch: LaunchConfig, known: set[str]) -> list[Path]:
    """Return the trial folders with a finished result that is of none of the ``known`` keys."""
    manifests = sorted((launch.store.resolve() / "trials").glob(f"*/{RESULT}/{MANIFEST}"))
    folders = [manifest.parent.parent for manifest in manifests]
    return [folder for folder in folders if folder.name not in known]


def recover(launch: LaunchConfig) -> Recovered:
    """Write a run for each finished result of the store that its database does not know.

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
            try:
                manifest = read_sealed(folder / RESULT)
            except Failure as damage:
                found.damaged.append(f"{folder / RESULT}: {damage}")
                continue
            found.names.append(_write_run(store, writer, folder, manifest))
    finally:
        writer.close()
    return found


def _write_run(store: Store, writer: Writer, folder: Path, manifest: dict[str, Any]) -> str:
    """Write one trial's run as its study would have; return the trial's name."""
    key = folder.name
    settings = build(manifest["settings"])
    record = _record(folder, settings)
    study = str(record["study"])
    experiment = store.experiment(study)
    parent = store.run(experiment, study, {KIND: "study"}, {STUDY: study})
    tags = {**record["tags"], STUDY: study, PARENT_RUN: parent, "folder": str(folder)}
    run_id = store.run(experiment, record["name"], {KIND: "trial", KEY: key}, tags)
    store.parameters(run_id, placeless(settings))
    writer.open(key, lambda: run_id)
    for epoch, metrics in enumerate(read_history(folder / RESULT), start=1):
        writer.metrics(key, epoch, metrics)
    final = {name: float(value) for name, value in manifest["metrics"].items() if name.startswith("test/")}
    writer.metrics(key, settings.recipe.epochs, final, again=True)
    writer.artifacts(key, folder / RESULT, RESULT)
    if TRAINED_BY not in tags:
        writer.register(key, study, {"trial": str(record["name"])})
    writer.end(key, "FINISHED")
    writer.open(study, lambda: parent)
    writer.end(study, "FINISHED")
    return f"{record['name']} ({study})"


def _record(folder: Path, settings: ExperimentConfig) -> dict[str, Any]:
    """Return what the trial's study wrote about it; where it wrote nothing, what its settings say."""
    with suppress(OSError, ValueError):
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    data = ABSENT
    with suppress(UserError):
        data = fingerprint(settings.data)
    return {"study": _UNKNOWN_STUDY, "name": folder.name, "tags": {IDENTITY: identity(settings, data)}}
