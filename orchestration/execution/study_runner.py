"""``mar run``: train what is missing, report from MLflow, say where everything is."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from rich.console import Console

from mar.errors import Failure, UserError, notice
from orchestration.config import LaunchConfig
from orchestration.execution.lock import study_lock
from orchestration.execution.preflight import check_data, check_weights
from orchestration.execution.progress import LiveProgress
from orchestration.execution.recorder import RunRecorder
from orchestration.execution.recover import finished_here, unrecorded
from orchestration.execution.scheduling import missing_trials, train_missing
from orchestration.execution.signals import graceful_shutdown
from orchestration.execution.webhook import failures_by_kind, notify_webhook
from orchestration.failures import REMEDIES
from orchestration.reporting.study_report import write_report
from orchestration.reporting.tables import FORMATS, table_info
from orchestration.studies.budget import Budget
from orchestration.studies.loader import fetch_weights
from orchestration.studies.matching import match
from orchestration.studies.trial import Study
from orchestration.tracking.store import Store


def run_study(study: Study, launch: LaunchConfig, budget: Budget | None = None) -> None:
    """Run a study to its table; with a ``budget``, of what is missing only what fits, in the study's order.

    Raises:
        UserError: the data is not there, another run of the study is alive, a trial does not fit the cluster.
        Failure: a trial was given up or stopped; the table shows what is there.
    """
    console, launch = Console(soft_wrap=True), launch.model_copy(update={"study": study.name})
    fetch_weights(study)
    with study_lock(study, launch):
        store = Store(launch)
        _mention_unrecorded(launch, store)
        missing, left_out = missing_trials(study, store), 0
        if budget:
            affordable = budget.take(study, missing, store.trials())
            missing, left_out = affordable, len(missing) - len(affordable)
        check_data(missing)
        check_weights(missing)
        have = len({trial.key for trial in study.to_run}) - len(missing) - left_out
        counts = f"{len(study.to_run)} trials, {have} finished before, {len(missing)} to train"
        counts += f", {left_out} left out: over the budget" if left_out else ""
        console.print(f"{study.file.title}: {counts}", markup=False)
        progress = LiveProgress(missing, have, console)
        with RunRecorder(study, store, progress) as recorder, graceful_shutdown(launch):
            try:
                if missing:
                    if launch.backend != "local" and not progress.is_live:
                        console.print("starting Ray and its workers: some 10 to 20 s", markup=False)
                    with progress:
                        train_missing(recorder, missing)
            finally:
                _finalize(recorder)
            folder = launch.report_folder(study.name)
            records = store.trials()
            table, lines = write_report(study, records, folder, store.file_of)
            recorder.log_report(folder, records, table)
    if (
        study.chosen is not None
    ):  # the report is of all rows, the terminal shows those that were asked for
        table = FORMATS["md"](
            table_info(replace(study, trials=study.to_run), records, store.file_of)
        )
    print(f"\n{table}")
    print("\n".join([*lines, ""]))
    print(
        f"figure   {folder / 'figure.png'}\nreport   {folder / 'report.html'} (and report.md, table.tex, …)"
    )
    served = "mar ui"
    if launch.tracking_uri:
        served = launch.shown_tracking
    elif str(launch.store) != "mar_store":
        served = f"mar ui --store {shlex.quote(str(launch.store))}"
    print(f"MLflow   {served}   (experiment {study.name!r})")
    notify_webhook(study, recorder)
    if recorder.failures:
        for kind, names in failures_by_kind(recorder).items():
            print(
                f"{kind:<8} {len(names)} trials: {', '.join(names)}. {REMEDIES[kind].capitalize()}."
            )
        left = (
            f", {recorder.num_left} not begun" if recorder.is_over() and recorder.num_left else ""
        )
        raise Failure(
            f"{len(recorder.failures)} of {len(study.trials)} trials failed{left}; run the same command to go on"
        )
    if recorder.was_stopped:
        raise Failure(
            f"stopped with {recorder.num_left} trials unfinished; run the same command to go on",
            "stopped",
        )


def _finalize(recorder: RunRecorder) -> None:
    """Wait for MLflow to have everything; where it stays away, print the table from the results that are here.

    Raises:
        Failure: the tracking store was not back in time.
    """
    try:
        recorder.finalize()
    except Failure as error:
        study, store = recorder.study, recorder.store
        records = finished_here(store.launch, dict.fromkeys(trial.key for trial in study.trials))
        print(f"\n{FORMATS['md'](table_info(study, records, store.file_of))}")
        hint = "The table above is from the results in the store; the same command writes them down when it is back"
        raise Failure(f"{error}. {hint}, or, without --tracking-uri, here") from None


def _mention_unrecorded(launch: LaunchConfig, store: Store) -> None:
    """Say that the store has results that its database does not know: somebody lost it."""
    lost = unrecorded(launch, {record.key for record in store.trials()})
    if lost:
        notice(
            f"{len(lost)} finished results in {launch.store / 'trials'} are not in the tracking store. Those of this study "
            f"are taken as they are, not trained again; mar recover --store {launch.store} brings back all"
        )


def run_studies(
    studies: Sequence[Study], launch: LaunchConfig, budget: Budget | None = None
) -> None:
    """Run studies one after the other in one Ray; what one of them trained, the next ones find.

    Raises:
        Failure: a study has trials that failed; the others were run.
        UserError: a study could not begin; the others were run.
    """
    before = {record.run_id for record in Store(launch).trials() if record.status == "FINISHED"}
    began = time.monotonic()
    wrong: list[str] = []
    is_users_alone, is_stopped = True, False
    with _one_backend(launch):
        for study in studies:
            try:
                run_study(study, launch, budget)
            except (Failure, UserError) as error:
                is_users_alone = is_users_alone and isinstance(error, UserError)
                wrong.append(f"{study.name}: {error}")
                print(f"mar: {wrong[-1]}")
                is_stopped = isinstance(error, Failure) and error.kind == "stopped"
            if is_stopped:
                break
    new = [
        record
        for record in Store(launch).trials()
        if record.run_id not in before and record.status == "FINISHED"
    ]
    trained, trials = (
        sum(record.has_model for record in new),
        [trial for study in studies for trial in study.trials],
    )
    there = len(match(trials, Store(launch).trials()))
    absent = len({trial.key for trial in trials}) - there if trials else 0
    minutes = (time.monotonic() - began) / 60
    print(
        f"{len(studies)} studies, {len(trials)} rows: {trained} trained and {len(new) - trained} tested in "
        f"{minutes:.1f} min; {absent} trials are not there, all other rows were there or are shared"
    )
    if is_stopped:
        raise Failure("stopped; run the same command to go on", "stopped")
    if wrong:
        kind = UserError if is_users_alone else Failure
        raise kind(f"{len(wrong)} of {len(studies)} studies are not whole: {'; '.join(wrong)}")


def _one_backend(launch: LaunchConfig) -> AbstractContextManager[None]:
    if launch.backend == "local":
        return nullcontext()
    from orchestration.backends import ray_tune

    return ray_tune.started(launch)
