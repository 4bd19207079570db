"""The verbs about studies: run, plan, table, figure, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mar.errors import UserError
from mar.safe_text import printable
from mar.training.retention import RetentionPolicy
from orchestration.cli.options import (
    DEFAULT_STORE,
    AsJson,
    IsAll,
    Only,
    Output,
    Overrides,
    RemotePlace,
    StoreFolder,
    StudyName,
    TrackingUri,
    file_finder,
    is_search_file,
    print_store,
    records_of,
    studies_of,
)
from orchestration.secrets import webhook_of

if TYPE_CHECKING:
    from orchestration.studies.trial import Study

_DEVICE = "Profile for device-hours: v100, h200, NAME=GFLOPS_PER_S."


def run(
    study: StudyName = None,
    overrides: Overrides = None,
    only: Only = None,
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    backend: Annotated[
        Literal["train", "inline"] | None,
        typer.Option(help="Ray Train workers (the default), or inside Tune's trial."),
    ] = None,
    is_local: Annotated[
        bool, typer.Option("--local", help="One trial after the other, here, without Ray.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Data-parallel workers of a trial.")] = 1,
    min_workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Elastic: go on with as few where there are no more, and grow again."
        ),
    ] = None,
    cpus_per_worker: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_worker: Annotated[
        int | None, typer.Option(min=0, help="Default: one where there are any.")
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Default: as many trials as fit.")
    ] = None,
    loader_processes: Annotated[
        int, typer.Option(min=0, help="Decoding processes of a worker.")
    ] = 0,
    max_microbatch_clips: Annotated[
        int | None, typer.Option(min=2, help="Accumulate gradients above this.")
    ] = None,
    activation_checkpointing: Annotated[
        bool,
        typer.Option("--recompute-activations", help="Where memory is short: a third more work."),
    ] = False,
    is_compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the model: slower to start; does it pay? mar bench."
        ),
    ] = False,
    checkpoint_every_steps: Annotated[
        int | None, typer.Option(min=1, help="Checkpoint inside epochs too.")
    ] = None,
    resize_s: Annotated[
        float, typer.Option(min=1, help="How often an elastic trial looks for more workers.")
    ] = 60.0,
    keep: Annotated[
        str, typer.Option(metavar="POLICY", help="Checkpoints that stay: last=N,best,every=EPOCHS.")
    ] = "last=2",
    retries: Annotated[int, typer.Option(min=0, help="Times a failed trial goes on.")] = 1,
    retry_numbers: Annotated[
        bool,
        typer.Option("--retry-numbers", help="Go on after a gradient that is not finite, too."),
    ] = False,
    remote: RemotePlace = None,
    cache_from: Annotated[
        str | None,
        typer.Option(
            metavar="URI", help="Object store to fetch data.cache from, once on each node."
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; default: a private one here.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="HOURS", help="Device-hours, as 200h: train what fits, in order."),
    ] = None,
    device: Annotated[str | None, typer.Option(help=_DEVICE)] = None,
    hang_timeout_s: Annotated[
        float,
        typer.Option(
            min=0, help="End and restart a worker that did nothing for so long; 0: never."
        ),
    ] = 1800.0,
    patience_s: Annotated[
        float,
        typer.Option(
            min=1, help="How long to wait for room on a full disk, or for an MLflow server."
        ),
    ] = 300.0,
    webhook: Annotated[
        str | None,
        typer.Option(help="Address that hears when a study ends, as JSON; or @FILE, which has it."),
    ] = None,
    is_all: IsAll = False,
) -> None:
    """Train what is missing of a study (a killed run goes on by itself), then print its table."""
    from orchestration.config import LaunchConfig
    from orchestration.execution.study_runner import run_studies, run_study
    from orchestration.studies.budget import Budget
    from orchestration.studies.plan import device as profile_of
    from orchestration.tracking.provenance import check_pinned

    check_pinned()
    if is_local and backend:
        raise UserError(f"--local --backend {backend}: one or the other; --local is without Ray")
    if device and budget is None:
        raise UserError(
            f"--device {device}: it tells what --budget is spent on; give --budget too, or leave it out"
        )
    if (min_workers or 1) > workers:
        raise UserError(f"--min-workers {min_workers}: more than --workers {workers}")
    if cache_from:
        _fetch(cache_from, overrides or [])
    launch = LaunchConfig(
        store=store,
        tracking_uri=tracking_uri,
        backend="local" if is_local else backend or "train",
        address=address,
        workers=workers,
        min_workers=min_workers,
        resize_s=resize_s,
        keep=_kept(keep),
        retry_numbers=retry_numbers,
        remote=remote,
        cache_from=cache_from,
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        max_concurrent_trials=max_concurrent,
        loader_processes=loader_processes,
        max_microbatch_clips=max_microbatch_clips,
        activation_checkpointing=activation_checkpointing,
        compile=is_compiled,
        checkpoint_every_steps=checkpoint_every_steps,
        retries=retries,
        hang_timeout_s=hang_timeout_s or None,
        patience_s=patience_s,
        webhook=webhook_of(webhook) if webhook else None,
    )
    if study and not is_all and is_search_file(study):
        from orchestration.execution.search_runner import run_search
        from orchestration.search.schema import read_search

        if only or budget is not None:
            raise UserError(
                f"{study} is a search: --only and --budget are for studies; 'trials=N' says how many it trains"
            )
        from dataclasses import replace

        from orchestration.studies.names import name_in_store

        search = read_search(study, overrides or [])
        print_store(store, tracking_uri, may_be_new=True)
        run_search(
            replace(search, name=name_in_store(search.name, search.path, store, claims=True)),
            launch,
        )
        return
    studies = _studies_to_run(study, overrides, only, is_all, store)
    print_store(store, tracking_uri, may_be_new=True)
    limit = (
        Budget(_hours(budget), profile_of(device) if device else None)
        if budget is not None
        else None
    )
    if is_all:
        run_studies(studies, launch, limit)
    else:
        run_study(studies[0], launch, limit)


def _studies_to_run(
    name: str | None, overrides: list[str] | None, only: list[str] | None, is_all: bool, store: Path
) -> list[Study]:
    """Return the studies; with ``only``, whole ones of which some trials are to run, so that reports stay whole."""
    from dataclasses import replace

    whole = studies_of(name, overrides, None, is_all, store, claims=True)
    if not only:
        return whole
    chosen = studies_of(name, overrides, only, is_all, store)
    pairs = zip(whole, chosen, strict=True)
    return [
        replace(study, chosen=frozenset(trial.key for trial in part.trials))
        for study, part in pairs
    ]


def _fetch(cache_from: str, overrides: list[str]) -> None:
    """Bring a frame cache here, without which the study cannot be read; who trains elsewhere fetches it too."""
    from orchestration.storage.object_store import remote as at
    from orchestration.storage.trial_sync import fetch_cache

    caches = [word.partition("=")[2] for word in overrides if word.startswith("data.cache=")]
    if not caches:
        raise UserError("--cache-from: to where? Give data.cache=DIR too")
    if not fetch_cache(at(cache_from), Path(caches[-1])) and not Path(caches[-1]).is_dir():
        raise UserError(
            f"--cache-from {cache_from}: there is no frame cache; mar data pack RECIPE DIR --remote URI"
        )


def _kept(text: str) -> RetentionPolicy:
    """Return the policy that ``last=2,best`` says."""
    try:
        return RetentionPolicy.parse(text)
    except ValueError as error:
        raise UserError(f"--keep {text}: {error}") from None


def _hours(text: str) -> float:
    """Return the hours that ``200h`` or ``200`` say."""
    try:
        hours = float(text.removesuffix("h"))
    except ValueError:
        hours = -1.0
    if not 0 <= hours < float("inf"):
        raise UserError(f"--budget {text}: expected device-hours, as 200h")
    return hours


def plan(
    study: StudyName = None,
    overrides: Overrides = None,
    only: Only = None,
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    device: Annotated[str | None, typer.Option(help=_DEVICE)] = None,
    price_per_h: Annotated[
        float | None, typer.Option(min=0, help="Of such a device, in your money.")
    ] = None,
    is_all: IsAll = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what keeps each new trial from being an old run.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List a study's trials: which are there, which are new, what they cost. Trains nothing."""
    from dataclasses import replace

    from orchestration.execution.preflight import check_data
    from orchestration.studies.diff import Neighbours
    from orchestration.studies.plan import Planned, plan_json, plan_text, plan_trials
    from orchestration.studies.plan import device as profile_of

    if price_per_h is not None and device is None:
        raise UserError(
            "--price-per-h: of which device? Give --device too (v100, h200, NAME=GFLOPS_PER_S)"
        )
    profile = profile_of(device) if device else None
    profile = (
        replace(profile, price_per_h=price_per_h)
        if profile and price_per_h is not None
        else profile
    )
    if study and not is_all and is_search_file(study):
        from orchestration.search.initial_points import as_study
        from orchestration.search.schema import read_search

        search = read_search(study, overrides or [])
        studies = [as_study(search)]
        left = search.file.trials - len(studies[0].trials)
        print(
            f"a search: its first points, and {max(left, 0)} more that it will propose",
            file=sys.stderr,
        )
    else:
        studies = studies_of(study, overrides, only, is_all, store)
    records, planned = records_of(store, tracking_uri, may_be_new=True), Planned()
    check_data([trial for each in studies for trial in each.trials], only_present=True)
    lines = [line for each in studies for line in plan_trials(each, records, profile, planned)]
    neighbours = Neighbours(records) if explain else None
    print(
        plan_json(lines, neighbours)
        if as_json
        else printable(plan_text(lines, profile, neighbours))
    )


def table(
    study: StudyName = None,
    overrides: Overrides = None,
    only: Only = None,
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    form: Annotated[Literal["md", "tex", "html", "csv", "json"], typer.Option("--format")] = "md",
) -> None:
    """Print a study's table from what MLflow remembers."""
    from orchestration.reporting.tables import FORMATS, table_info

    (read,) = studies_of(study, overrides, only, False, store)
    print(
        FORMATS[form](
            table_info(read, records_of(store, tracking_uri), file_finder(store, tracking_uri))
        ),
        end="",
    )


def figure(
    study: StudyName = None,
    overrides: Overrides = None,
    only: Only = None,
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    output: Output = None,
) -> None:
    """Draw a study's figure from what MLflow remembers (png, pdf, svg, or html that answers the mouse)."""
    from orchestration.reporting.plotly_figures import write_figure

    (read,) = studies_of(study, overrides, only, False, store)
    file = output or Path(f"{read.name}.png")
    write_figure(read, records_of(store, tracking_uri), file, file_finder(store, tracking_uri))
    print(file)


def report(
    study: StudyName = None,
    overrides: Overrides = None,
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    output: Output = None,
    is_all: IsAll = False,
) -> None:
    """Write a study's table in every format, its figure and a page; with --all one page over all studies."""
    from orchestration.config import LaunchConfig
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
    if output and output.suffix:
        raise UserError(
            f"-o {output}: a study's report is a folder of files, its page is report.html in it; name a folder"
        )
    folder = output or launch.report_folder(studies[0].name)
    write_report(
        studies[0], records_of(store, tracking_uri), folder, file_finder(store, tracking_uri)
    )
    print(folder)
