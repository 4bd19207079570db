"""The verbs for clusters and running studies: submit, jobs, status, stop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mar.errors import Failure, UserError
from mar.safe_text import printable
from orchestration.cli.launch_options import check_launch_options
from orchestration.cli.options import (
    DEFAULT_STORE,
    AsJson,
    ObjectStoreUri,
    StoreFolder,
    TrackingUri,
    is_search_file,
    print_store,
)
from orchestration.cli.studies import run

jobs_app = typer.Typer(
    no_args_is_help=True, help="Jobs that mar submit started: list, follow, stop."
)

Address = Annotated[
    str,
    typer.Option(help="The cluster's dashboard, as http://127.0.0.1:8265.", envvar="MAR_ADDRESS"),
]
AllowUnauthenticated = Annotated[
    bool,
    typer.Option("--allow-unauthenticated", help="Accept a cluster that answers without a token."),
]
JobId = Annotated[str, typer.Argument(metavar="JOB")]


def submit(
    context: typer.Context,
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY", help="A study, as mar run takes it; mar run's options may follow."
        ),
    ],
    address: Address,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the job's log.")] = False,
    allow_unauthenticated: AllowUnauthenticated = False,
    any_versions: Annotated[
        bool, typer.Option("--any-versions", help="Accept the cluster's versions of the packages.")
    ] = False,
) -> None:
    """Run a study on a Ray cluster, through its Jobs API: packs code and study, not data.

    Takes mar run's options.
    """
    from orchestration.backends.ray_jobs import Jobs, leave
    from orchestration.tracking.provenance import PINNED, package_versions

    # Before the cluster is asked: a mistake here needs no connection.
    _check(study, context.args)
    jobs = Jobs(address, allow_unauthenticated)
    if any_versions:
        environment = {}
    else:
        # The job compares them with the node's before it trains (``check_pinned``).
        environment = {PINNED: json.dumps(package_versions())}
    job_id, is_new = jobs.submit(study, context.args, environment)
    # Flushed: the job's log follows, and whoever reads the output needs the id first.
    print(
        f"{job_id} {'submitted' if is_new else 'is queued or running already: joined'}", flush=True
    )
    if detach:
        leave(job_id, address)
        return
    _follow(job_id, address, allow_unauthenticated)


@jobs_app.command("list")
def list_jobs(
    address: Address, allow_unauthenticated: AllowUnauthenticated = False, as_json: AsJson = False
) -> None:
    """List mar's jobs on a cluster, the newest first."""
    from orchestration.backends.ray_jobs import Jobs

    found = Jobs(address, allow_unauthenticated).list()
    if as_json:
        print(json.dumps([vars(job) for job in found], indent=1))
        return
    # A job's message may contain the escape codes of a terminal (``printable``).
    for job in found:
        if job.minutes is None:
            minutes = ""
        else:
            minutes = f"{job.minutes:.1f} min"
        print(
            (
                f"{job.job_id:<44} {job.status:<10} {job.began:<17} {minutes:>10}  "
                f"{printable(job.message)}"
            ).rstrip()
        )
    print(f"{len(found)} jobs" if found else "no jobs of mar submit")


@jobs_app.command()
def follow(
    job: JobId, address: Address, allow_unauthenticated: AllowUnauthenticated = False
) -> None:
    """Print a job's log until it ends."""
    _follow(job, address, allow_unauthenticated)


@jobs_app.command()
def stop(job: JobId, address: Address, allow_unauthenticated: AllowUnauthenticated = False) -> None:
    """Stop a job now. Its results and checkpoints are kept: the same submission resumes it."""
    from orchestration.backends.ray_jobs import Jobs

    Jobs(address, allow_unauthenticated).stop(job)
    print(f"{job} is being stopped")


def status(
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    object_store: ObjectStoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Show which studies of a store run, and how far they are.

    Works in any terminal, and on any machine that sees the store.
    """
    from dataclasses import asdict

    from orchestration.config import LaunchConfig, WorkerConfig
    from orchestration.execution.status import status as status_of
    from orchestration.execution.status import status_text

    print_store(store, tracking_uri)
    # Where nodes share no disk, heartbeats are in the object store.
    worker = WorkerConfig(object_store=object_store)
    found = status_of(LaunchConfig(store=store, tracking_uri=tracking_uri, worker=worker))
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    else:
        print(printable(status_text(found, store)))


def stop_study(
    study: Annotated[
        str, typer.Argument(metavar="STUDY", help="A study that runs from the store.")
    ],
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    object_store: ObjectStoreUri = None,
) -> None:
    """Stop a running study after its trials have saved; the same mar run resumes it."""
    from orchestration.config import LaunchConfig, WorkerConfig
    from orchestration.execution.status import stop as stop_of
    from orchestration.studies.names import name_of

    # The lock and the stop file have the study's name in this store, which need not be its file's.
    name = name_of(study, store)
    worker = WorkerConfig(object_store=object_store)
    launch = LaunchConfig(store=store, study=name, tracking_uri=tracking_uri, worker=worker)
    stop_of(launch)
    print(f"{name} stops as soon as its trials have saved")


def _follow(job_id: str, address: str, allow_unauthenticated: bool) -> None:
    from orchestration.backends.ray_jobs import Jobs, leave

    try:
        status = Jobs(address, allow_unauthenticated).follow(job_id)
    # Ctrl-C ends the following, not the job.
    except KeyboardInterrupt:
        leave(job_id, address)
        # 128 + 2, as a shell reports an end by SIGINT.
        sys.exit(130)
    if status != "SUCCEEDED":
        raise Failure(f"{job_id}: {status}")


def _check(study: str, arguments: list[str]) -> None:
    """Check the study and mar run's options here, so that mistakes are reported before submission.

    Raises:
        UserError: the study or an option is wrong, or a path is relative.
    """
    given = _parse_run_options(study, arguments)
    check_launch_options(given)
    if given.get("address") or given.get("backend") == "local":
        raise UserError(
            "mar submit: --address is the dashboard's, and --backend local is for this machine"
        )
    # A relative path would mean the job's own folder, which the cluster removes.
    store = Path(given["store"])
    if not store.is_absolute():
        raise UserError(
            f"--store {store}: on a cluster it must be absolute, on storage that every node sees"
        )
    if given.get("is_all"):
        raise UserError("mar submit: one study at a time")
    overrides = given.get("overrides") or []
    if is_search_file(study):
        from orchestration.search.schema import read_search

        # All trials of a search share their data.
        roots = {read_search(study, overrides).settings({}).data.root}
    else:
        from orchestration.studies.loader import read_study

        trials = read_study(study, overrides, given.get("only") or []).trials
        roots = {trial.settings.data.root for trial in trials}
    relative = sorted(str(root) for root in roots if not Path(root).is_absolute())
    if relative:
        raise UserError(
            f"data.root={relative[0]}: on a cluster it must be absolute, where every node sees it"
        )


def _parse_run_options(study: str, arguments: list[str]) -> dict[str, Any]:
    """Return mar run's parameters, parsed by its own options."""
    # An app with this one verb: the command's own app imports this module.
    run_app = typer.Typer(add_completion=False)
    run_app.command()(run)
    command = typer.main.get_command(run_app)
    return command.make_context("mar submit", [study, *arguments]).params
