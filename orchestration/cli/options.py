"""The options and arguments that several verbs share, and functions that use them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mar.errors import UserError
from orchestration.config import DEFAULT_STORE as DEFAULT_STORE
from orchestration.secrets import without_secrets

if TYPE_CHECKING:
    from orchestration.studies.trial import Study

_SCHEMES = ("s3://", "gs://", "file://")


def _object_store(uri: str | None) -> str | None:
    """Check an object store's address.

    Raises:
        UserError: its scheme is not known.
    """
    # Here too, as in ``WorkerConfig``: a verb without a launch takes this option as well.
    if uri and not uri.startswith(_SCHEMES):
        raise UserError(f"--object-store {uri}: expected s3://bucket/folder or gs://bucket/folder")
    return uri


StudyName = Annotated[
    str | None,
    typer.Argument(
        metavar="STUDY",
        help=(
            "A study file, or the name of one that ships with mar; or a recipe, as a study of one "
            "trial."
        ),
    ),
]
RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that ships with mar."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[path=value …]", help="Settings, as mask.ratio=0.75.")
]
Filter = Annotated[
    list[str] | None,
    typer.Option("--filter", metavar="AXIS=LABEL", help="Only these trials; repeatable."),
]
StoreFolder = Annotated[
    Path, typer.Option("--store", envvar="MAR_STORE", help="Folder of checkpoints and tracking.")
]
TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow server.")
]
ObjectStoreUri = Annotated[
    str | None,
    typer.Option(
        "--object-store",
        envvar="MAR_OBJECT_STORE",
        metavar="URI",
        callback=_object_store,
        help=(
            "Object store for checkpoints and results, where nodes share no disk: "
            "s3://bucket/folder, gs://…."
        ),
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="File to write.")]
IsAll = Annotated[bool, typer.Option("--all", help="Every study of the paper that ships with mar.")]


def print_store(store: Path, tracking_uri: str | None, may_be_new: bool = False) -> bool:
    """Print on the error stream which store is used, and return whether it exists.

    Raises:
        UserError: it does not exist, and it may not be new.
    """
    location = str(store.resolve())
    exists = (store / "mlflow.db").is_file()
    # Whether a server has a store is not asked here: that would take a connection.
    if tracking_uri:
        location = without_secrets(tracking_uri)
        exists = True
    if not exists and not may_be_new:
        advice = "mar run makes one"
        # Results without a database: it was lost, and can be made again.
        if any((store / "trials").glob("*/result/manifest.json")):
            advice = f"it has results: mar recover --store {store}"
        raise UserError(f"--store {store}: no tracking store in {location} ({advice})")
    new = ""
    if not exists:
        new = " (new)"
    print(f"store    {location}{new}", file=sys.stderr)
    return exists


def records_of(store: Path, tracking_uri: str | None, may_be_new: bool = False) -> list[Any]:
    """Return the trials' runs in MLflow; none if the store may be new and does not exist.

    Raises:
        UserError: the store does not exist, and it may not be new.
    """
    if not print_store(store, tracking_uri, may_be_new):
        return []
    # Not at the top: it loads MLflow, which takes seconds.
    from orchestration.stored_results import records_of_store

    return list(records_of_store(store, tracking_uri))


def studies_of(
    name: str | None,
    overrides: list[str] | None,
    only: list[str] | None,
    is_all: bool,
    store: Path,
    claims: bool = False,
) -> list[Study]:
    """Return the named study, or with ``--all`` every study of the paper, in the paper's order.

    The studies have their names in the store. With ``claims``, the store records that these names
    belong to their files.

    Raises:
        UserError: neither or both were given; or what ``read_study`` raises.
    """
    from orchestration.stored_results import named_in_store
    from orchestration.studies.loader import paper_studies, read_study

    if is_all:
        # The first word is then an override: Typer took it for the study.
        if name and "=" not in name:
            raise UserError(f"{name}: a study or --all, not both")
        arguments = list(overrides or [])
        if name:
            arguments.insert(0, name)
        studies = [read_study(each, arguments, only or []) for each in paper_studies()]
        return [named_in_store(study, store, claims) for study in studies]
    if name is None:
        raise UserError("which study? (a file, a name that ships with mar, or --all)")
    if is_search_file(name):
        raise UserError(f"{name} is a search, not a study: mar run runs it, and writes its report")
    return [named_in_store(read_study(name, overrides or [], only or []), store, claims)]


def is_search_file(name: str) -> bool:
    """Whether a file is a search, and not a study or a recipe."""
    from orchestration.studies.yaml_document import Document, find

    # Only the file of a search has this key at its top level.
    return "space" in Document(find(name, "study")).content
