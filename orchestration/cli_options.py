"""What several verbs of the command take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mar.errors import UserError

if TYPE_CHECKING:
    from orchestration.study import Study

_SCHEMES = ("s3://", "gs://", "file://")


def _object_store(place: str | None) -> str | None:
    if place and not place.startswith(_SCHEMES):
        raise UserError(f"--remote {place}: expected s3://bucket/folder or gs://bucket/folder")
    return place


StudyName = Annotated[
    str | None,
    typer.Argument(
        metavar="STUDY",
        help="A study file, or the name of one that ships with mar; or a recipe, as a study of one trial.",
    ),
]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that ships with mar.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[path=value …]", help="Settings, as mask.ratio=0.75.")]
Only = Annotated[list[str] | None, typer.Option("--only", metavar="AXIS=LABEL", help="Only these trials; repeatable.")]
StoreFolder = Annotated[Path, typer.Option("--store", envvar="MAR_STORE", help="Folder of checkpoints and tracking.")]
TrackingUri = Annotated[str | None, typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow server.")]
RemotePlace = Annotated[
    str | None,
    typer.Option(
        "--remote",
        envvar="MAR_REMOTE",
        metavar="URI",
        callback=_object_store,
        help="Object store for checkpoints and results, where nodes share no disk: s3://bucket/folder, gs://….",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="File to write.")]
IsAll = Annotated[bool, typer.Option("--all", help="Every study of the paper that ships with mar.")]
DEFAULT_STORE = Path("mar_store")


def records_of(store: Path, tracking_uri: str | None) -> list[Any]:
    """Return what MLflow remembers; nothing while there is no embedded store yet."""
    if tracking_uri is None and not (store / "mlflow.db").is_file():
        return []
    from orchestration.config import LaunchConfig
    from orchestration.tracking import Store

    return list(Store(LaunchConfig(store=store, tracking_uri=tracking_uri)).trials())


def studies_of(name: str | None, overrides: list[str] | None, only: list[str] | None, is_all: bool) -> list[Study]:
    """Return the study that was named, or with ``--all`` every study of the paper, in its order.

    Raises:
        UserError: neither or both were given; or what ``read_study`` raises.
    """
    from orchestration.study import paper_studies, read_study

    if is_all:  # then the first word is an override too
        words = [*([name] if name else []), *(overrides or [])]
        if name and "=" not in name:
            raise UserError(f"{name}: a study or --all, not both")
        return [read_study(each, words, only or []) for each in paper_studies()]
    if name is None:
        raise UserError("which study? (a file, a name that ships with mar, or --all)")
    if is_search_file(name):
        raise UserError(f"{name} is a search, not a study: mar run runs it, and writes its report")
    return [read_study(name, overrides or [], only or [])]


def is_search_file(name: str) -> bool:
    """Whether a file is a search, and not a study or a recipe."""
    from orchestration.files import Document, find

    return "space" in Document(find(name, "study")).content


def file_finder(store: Path, tracking_uri: str | None) -> Callable[[Any, str], Path]:
    """Return what finds a file of a run's result, fetching it from MLflow where it is not here."""

    def find(record: Any, name: str) -> Path:
        from orchestration.config import LaunchConfig
        from orchestration.tracking import Store

        return Store(LaunchConfig(store=store, tracking_uri=tracking_uri)).file_of(record, name)

    return find
