"""Finds a trained model by its name in MLflow: a run, or a version of a registered model."""

from __future__ import annotations

from pathlib import Path

from mar.errors import UserError
from orchestration.config import LaunchConfig
from orchestration.tracking.client import MlflowException
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store
from orchestration.tracking.tags import TRAINED_BY


def result_folder(name: str, launch: LaunchConfig) -> Path:
    """Return the result folder of ``runs:/RUN_ID``, ``models:/NAME/VERSION`` or ``…/NAME@ALIAS``.

    A result that is not on this disk is downloaded into the store.

    Raises:
        UserError: the name is not complete, or MLflow does not know it.
        Failure: the run has no result, or MLflow does not answer.
    """
    # Opening a store that does not exist would make an empty one.
    if launch.tracking_uri is None and not launch.database.is_file():
        raise UserError(f"{name}: no tracking store in {launch.store.resolve()}")
    store = Store(launch)
    try:
        record = store.trial(_run_id(name, store))
    except MlflowException as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name}: not in {launch.shown_tracking}: {reason}") from None
    # A study has a run of its own beside its trials'.
    if not record.key:
        raise UserError(f"{name}: a study's run, which has no model; name the run of a trial")
    return store.result_of(source_run(record, store))


def trained_folder(record: RunRecord, launch: LaunchConfig) -> Path:
    """Return the result folder of the model that a run was tested with.

    Raises:
        UserError: the run was tested with another's model, and that run is gone.
        Failure: neither this disk nor MLflow has the result.
    """
    store = Store(launch)
    return store.result_of(source_run(record, store))


def _run_id(name: str, store: Store) -> str:
    """Return the id of the run that a name leads to.

    Raises:
        UserError: the name is not complete.
    """
    kind, _, rest = name.partition(":/")
    # "runs:/ID/result" is MLflow's address of an artifact: the run is meant.
    first, _, last = rest.strip("/").partition("/")
    if kind == "runs" and first:
        return first
    model, _, alias = first.partition("@")
    if kind == "models" and model and alias:
        return str(store.client.get_model_version_by_alias(model, alias).run_id)
    if kind == "models" and model and last.isdigit():
        return str(store.client.get_model_version(model, last).run_id)
    raise UserError(
        f"{name}: expected runs:/RUN_ID, models:/STUDY/VERSION or models:/STUDY@best; the store's "
        "models are on MLflow's page Models (mar ui)"
    )


def source_run(record: RunRecord, store: Store) -> RunRecord:
    """Return the run whose model a run was tested with: its own, or that of the trial it names.

    Raises:
        UserError: that trial's run is gone.
    """
    key = record.tags.get(TRAINED_BY)
    if key is None:
        return record
    for other in store.trials():
        if other.key == key and other.status == "FINISHED":
            return other
    raise UserError(f"runs:/{record.run_id} was tested with a model whose run is gone ({key})")
