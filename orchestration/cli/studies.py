"""The verbs for studies: run, plan, table, figure, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mar.errors import UserError, notice
from mar.safe_text import printable
from orchestration.cli.launch_options import takes_launch_options
from orchestration.cli.options import (
    DEFAULT_STORE,
    AsJson,
    Filter,
    IsAll,
    Output,
    Overrides,
    StoreFolder,
    StudyName,
    TrackingUri,
    is_search_file,
    print_store,
    records_of,
    studies_of,
)
from orchestration.config import LaunchConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestration.reporting.study_results import StudyResults
    from orchestration.studies.budget import Budget, Order
    from orchestration.studies.trial import Study

_DEVICE = "Profile for device-hours: v100, h200, NAME=GFLOPS_PER_S."


@takes_launch_options
def run(
    study: StudyName = None,
    overrides: Overrides = None,
    only: Filter = None,
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="HOURS", help="Device-hours, as 200h: train what fits, in order."),
    ] = None,
    device: Annotated[str | None, typer.Option(help=_DEVICE)] = None,
    is_all: IsAll = False,
    order: Annotated[
        Literal["file", "shared", "cheapest"],
        typer.Option(
            help="Which trials run first: the study's own order; what most of the studies need; or "
            "the cheapest."
        ),
    ] = "file",
    *,
    launch: LaunchConfig,
) -> None:
    """Train what is missing of a study (a killed run resumes by itself), then print its table."""
    from orchestration.tracking.provenance import check_pinned

    # A job that was submitted with pinned versions must not train with others.
    check_pinned()
    if device and budget is None:
        raise UserError(
            f"--device {device}: it is the device on which --budget is spent; give --budget too, "
            "or leave it out"
        )
    if launch.worker.cache_from:
        _fetch_cache(launch.worker.cache_from, overrides or [])
    # With --all the first word is an override, not a study.
    if study and not is_all and is_search_file(study):
        if only or budget is not None or order != "file":
            raise UserError(
                f"{study} is a search: --filter, --budget and --order are for studies; trials=N "
                "sets how many trials it runs"
            )
        _run_search(study, overrides or [], launch)
    else:
        studies = _studies_to_run(study, overrides, only, is_all, store)
        among: Sequence[Study] = studies
        if order == "shared" and not is_all:
            among = _paper_studies(overrides, store)
        limit = _budget(budget, device)
        _run_studies(studies, launch, limit, is_all, order, among)


def _run_search(name: str, overrides: list[str], launch: LaunchConfig) -> None:
    from dataclasses import replace

    from orchestration.execution.search_runner import run_search
    from orchestration.search.schema import read_search
    from orchestration.studies.names import name_in_store

    # After the file: a mistake in it is reported before the store is named.
    search = read_search(name, overrides)
    print_store(launch.store, launch.tracking_uri, may_be_new=True)
    # Another file may have the same stem: then this search gets a name of its own in the store.
    stored_name = name_in_store(search.name, search.path, launch.store, claims=True)
    run_search(replace(search, name=stored_name), launch)


def _run_studies(
    studies: list[Study],
    launch: LaunchConfig,
    budget: Budget | None,
    is_all: bool,
    order: Order,
    among: Sequence[Study],
) -> None:
    from orchestration.execution.study_runner import run_studies, run_study

    # On the error stream, so that the output of the verb stays the study's.
    print_store(launch.store, launch.tracking_uri, may_be_new=True)
    if is_all:
        run_studies(studies, launch, budget, order)
    else:
        run_study(studies[0], launch, budget, order, among)


def _budget(hours: str | None, device: str | None) -> Budget | None:
    from orchestration.studies.budget import Budget
    from orchestration.studies.devices import device as profile_of

    if hours is None:
        return None
    # Without a device, the budget uses the speed that earlier runs measured.
    profile = profile_of(device) if device else None
    return Budget(_hours(hours), profile)


def _paper_studies(overrides: list[str] | None, store: Path) -> list[Study]:
    """Return the paper's studies under the same overrides: with them one study shares its rows."""
    try:
        return studies_of(None, overrides, None, True, store)
    except UserError as error:
        # An override of this study's own axes means nothing to the others.
        notice(f"--order shared: the paper's studies cannot be counted ({error}): cheapest first")
        return []


def _studies_to_run(
    name: str | None, overrides: list[str] | None, only: list[str] | None, is_all: bool, store: Path
) -> list[Study]:
    """Return the studies to run.

    With a filter they keep all of their trials, so that their reports stay complete; ``chosen`` has
    the names of those that run.
    """
    from dataclasses import replace

    whole = studies_of(name, overrides, None, is_all, store, claims=True)
    if not only:
        return whole
    filtered = studies_of(name, overrides, only, is_all, store)
    studies: list[Study] = []
    # Both lists are of the same studies, in the same order.
    for study, part in zip(whole, filtered, strict=True):
        chosen = frozenset(trial.name for trial in part.trials)
        studies.append(replace(study, chosen=chosen))
    return studies


def _fetch_cache(uri: str, overrides: list[str]) -> None:
    """Download the frame cache to this machine, which needs it to read the study.

    Each node that trains downloads it too.

    Raises:
        UserError: no folder is given, or the object store has no frame cache.
    """
    from orchestration.storage.object_store import open_object_store
    from orchestration.storage.trial_sync import fetch_cache

    folders = [
        word.removeprefix("data.cache=") for word in overrides if word.startswith("data.cache=")
    ]
    if not folders:
        raise UserError("--cache-from: to where? Give data.cache=DIR too")
    # As with all overrides, the last one holds.
    folder = Path(folders[-1])
    # A cache that is on this disk already serves, too.
    if not fetch_cache(open_object_store(uri), folder) and not folder.is_dir():
        raise UserError(
            f"--cache-from {uri}: it has no frame cache; make one with mar data pack RECIPE DIR "
            "--object-store URI"
        )


def _hours(text: str) -> float:
    """Return the hours that ``200h`` or ``200`` stands for.

    Raises:
        UserError: the text is not a number, or the number is negative or infinite.
    """
    try:
        hours = float(text.removesuffix("h"))
    except ValueError:
        hours = -1.0
    # Written so that NaN fails, too.
    if not 0 <= hours < float("inf"):
        raise UserError(f"--budget {text}: expected device-hours, as 200h")
    return hours


def plan(
    study: StudyName = None,
    overrides: Overrides = None,
    only: Filter = None,
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    device: Annotated[str | None, typer.Option(help=_DEVICE)] = None,
    price_per_h: Annotated[
        float | None,
        typer.Option(min=0, help="Price of an hour of such a device, in your currency."),
    ] = None,
    is_all: IsAll = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show what differs between each new trial and old runs."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List a study's trials: which are finished, which are new, what they cost. Trains nothing."""
    from dataclasses import replace

    from orchestration.config import LaunchConfig
    from orchestration.execution.preflight import check_data, frames_to_pack
    from orchestration.studies.devices import device as profile_of
    from orchestration.studies.diff import Neighbours
    from orchestration.studies.plan import Planned, plan_json, plan_text, plan_trials

    if price_per_h is not None and device is None:
        raise UserError(
            "--price-per-h: of which device? Give --device too (v100, h200, NAME=GFLOPS_PER_S)"
        )
    profile = None
    if device:
        profile = profile_of(device)
        if price_per_h is not None:
            profile = replace(profile, price_per_h=price_per_h)
    if study and not is_all and is_search_file(study):
        studies = [_initial_points(study, overrides or [])]
    else:
        studies = studies_of(study, overrides, only, is_all, store)
    # Without a store nothing is finished: a plan needs none.
    records = records_of(store, tracking_uri, may_be_new=True)
    # A plan is possible without the data; what is on this machine is checked.
    check_data([trial for each in studies for trial in each.trials], only_present=True)
    # Shared: a trial of two studies is planned, and costs, once.
    planned = Planned()
    lines = [line for each in studies for line in plan_trials(each, records, profile, planned)]
    neighbours = None
    if explain:
        neighbours = Neighbours(records)
    if as_json:
        print(plan_json(lines, neighbours))
    else:
        print(printable(plan_text(lines, profile, neighbours)))
        new = [line.trial for line in lines if line.state in ("new", "test")]
        for cache in frames_to_pack(new, LaunchConfig(store)).values():
            print(printable(f"frames to pack before the first epoch: {cache.text}"))


def _initial_points(name: str, overrides: list[str]) -> Study:
    """Return the initial points of a search, as a study.

    Prints how many more trials it will propose.
    """
    from orchestration.search.initial_points import as_study
    from orchestration.search.schema import read_search

    search = read_search(name, overrides)
    study = as_study(search)
    left = max(search.file.trials - len(study.trials), 0)
    print(f"a search: its initial points, and {left} more that it will propose", file=sys.stderr)
    return study


def table(
    study: StudyName = None,
    overrides: Overrides = None,
    only: Filter = None,
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    form: Annotated[Literal["md", "tex", "html", "csv", "json"], typer.Option("--format")] = "md",
) -> None:
    """Print a study's table from its runs in MLflow."""
    from orchestration.reporting.table_formats import FORMATS
    from orchestration.reporting.tables import table_info

    # Without --all it is always one study.
    (read,) = studies_of(study, overrides, only, False, store)
    print(FORMATS[form](table_info(_results(read, store, tracking_uri))), end="")


def figure(
    study: StudyName = None,
    overrides: Overrides = None,
    only: Filter = None,
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    output: Output = None,
) -> None:
    """Draw a study's figure from its runs in MLflow (png, pdf, svg, or interactive html)."""
    from orchestration.reporting.drawing.plotly_figures import write_figure

    (read,) = studies_of(study, overrides, only, False, store)
    file = output or Path(f"{read.name}.png")
    write_figure(_results(read, store, tracking_uri), file)
    print(file)


def report(
    study: StudyName = None,
    overrides: Overrides = None,
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    output: Output = None,
    is_all: IsAll = False,
) -> None:
    """Write a study's table in every format, its figure and a page.

    With --all: one page for all studies.
    """
    from orchestration.reporting.study_report import write_report

    launch = LaunchConfig(store=store, tracking_uri=tracking_uri)
    studies = studies_of(study, overrides, None, is_all, store)
    if is_all:
        print_store(store, tracking_uri)
        from orchestration.reporting.site import write_site
        from orchestration.tracking.store import Store

        file = output or launch.report_folder("index.html")
        write_site(studies, Store(launch), [*([study] if study else []), *(overrides or [])], file)
        print(file)
        return
    # A likely mistake: -o with the name of a file, as the other verbs take it.
    if output and output.suffix:
        raise UserError(
            f"-o {output}: a study's report is a folder of files, its page is report.html in it; "
            "name a folder"
        )
    folder = output or launch.report_folder(studies[0].name)
    write_report(_results(studies[0], store, tracking_uri), folder)
    print(folder)


def _results(study: Study, store: Path, tracking_uri: str | None) -> StudyResults:
    """Return a study's results from MLflow.

    Raises:
        UserError: the store does not exist.
    """
    from orchestration.stored_results import results_of

    print_store(store, tracking_uri)
    return results_of(study, store, tracking_uri)
