"""What a store has of a study: its runs, its results, its best model.

The face for Python (``orchestration.api``) and the command's verbs read stores by these functions.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mar.errors import UserError, notice
from orchestration.config import DEFAULT_STORE, LaunchConfig
from orchestration.studies.best import best_by, best_of_study
from orchestration.studies.loader import read_study
from orchestration.studies.matching import match
from orchestration.studies.names import name_in_store

# Not at the top for real: MLflow takes seconds to load, and a plan without a store needs none.
if TYPE_CHECKING:
    from orchestration.reporting.study_results import StudyResults
    from orchestration.studies.trial import Study
    from orchestration.tracking.run_record import RunRecord


def records_of_store(store: Path, tracking_uri: str | None) -> list[RunRecord]:
    """Return the trials' runs in MLflow, of all studies."""
    from orchestration.tracking.store import Store

    return Store(LaunchConfig(store, tracking_uri)).trials()


def file_finder(store: Path, tracking_uri: str | None) -> Callable[[Any, str], Path]:
    """Return a function that finds a file of a run's result.

    The function downloads the file from MLflow if it is not on this disk.
    """
    # Opened with the first file: a table without paired tests needs none.
    opened: list[Any] = []

    def find(record: Any, name: str) -> Path:
        from orchestration.tracking.store import Store

        if not opened:
            opened.append(Store(LaunchConfig(store, tracking_uri)))
        return opened[0].file_of(record, name)

    return find


def results_of(study: Study, store: Path, tracking_uri: str | None) -> StudyResults:
    """Return the finished runs of a study's trials.

    Tells the user if there are none, while runs of the study with other settings are finished.
    """
    from orchestration.reporting.study_results import StudyResults

    records = records_of_store(store, tracking_uri)
    found = StudyResults.match(study, records, file_finder(store, tracking_uri))
    count = sum(run.experiment == study.name and run.status == "FINISHED" for run in records)
    if count and not found.runs:
        overrides = _last_overrides(study, store, tracking_uri)
        advice = ""
        if overrides:
            advice = f"; the last launch had {' '.join(map(shlex.quote, overrides))}"
        notice(
            f"{study.name}: its {count} finished runs have other settings than were asked "
            f"for{advice}. mar plan --explain shows what differs"
        )
    return found


def _last_overrides(study: Study, store: Path, tracking_uri: str | None) -> list[str]:
    from orchestration.tracking.store import Store

    return Store(LaunchConfig(store, tracking_uri)).last_overrides(study.name)


def has_store(store: Path, tracking_uri: str | None) -> bool:
    """Whether there may be runs to read: opening a store that does not exist would make it."""
    return tracking_uri is not None or LaunchConfig(store).database.is_file()


def named_in_store(study: Study, store: Path, claims: bool = False) -> Study:
    """Return a study with its name in the store.

    With ``claims``, the store records that the name belongs to the study's file.
    """
    # Only a file can claim a name in the store.
    if study.path is None:
        return study
    name = name_in_store(study.name, study.path, store, claims)
    return dataclasses.replace(study, name=name)


def best_result(
    name: str | Path, *, store: str | Path = DEFAULT_STORE, tracking_uri: str | None = None
) -> Path:
    """Return the result folder of the best trial of a study or search.

    The best is by a search's first objective, or by the first column of a study's table that is a
    measured metric with a better direction, as ``top1``. Where no trial has the file's settings,
    those of the study's last launch hold, and the user is told.

    Raises:
        UserError: the file cannot be read, or none of its trials is finished.
    """
    from orchestration.tracking.models import trained_folder

    folder = Path(store)
    best = _best_run(str(name), folder, tracking_uri)
    if best is None:
        raise UserError(
            f"{name}: no finished training of it in --store {folder}; mar run {name} trains it"
        )
    return trained_folder(best, LaunchConfig(folder, tracking_uri))


def _best_run(name: str, store: Path, tracking_uri: str | None) -> RunRecord | None:
    from orchestration.search.schema import read_search
    from orchestration.studies.yaml_document import Document, find

    if "space" not in Document(find(name, "study")).content:
        return _best_of_study(name, store, tracking_uri)
    search = read_search(name)
    stored = name_in_store(search.name, search.path, store)
    if not has_store(store, tracking_uri):
        return None
    finished = [
        run
        for run in records_of_store(store, tracking_uri)
        if run.experiment == stored and run.status == "FINISHED"
    ]
    metric, direction = next(iter(search.file.objectives.items()))
    return best_by(metric, direction == "max", finished)


def _best_of_study(name: str, store: Path, tracking_uri: str | None) -> RunRecord | None:
    study = named_in_store(read_study(name), store)
    if not has_store(store, tracking_uri):
        return None
    records = records_of_store(store, tracking_uri)
    found = match(study.trials, records)
    if not found:
        overrides = _last_overrides(study, store, tracking_uri)
        study = named_in_store(read_study(name, overrides), store)
        found = match(study.trials, records)
        if found:
            overrides_text = " ".join(map(shlex.quote, overrides))
            notice(f"{name}: the best with the settings of its last launch: {overrides_text}")
    return best_of_study(study, found)
