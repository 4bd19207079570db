"""``mar run`` of a study: trains the missing trials, reports from MLflow, prints where to look."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from mar.errors import Failure, UserError, notice
from orchestration.backends.choice import backend_of
from orchestration.config import DEFAULT_STORE, LaunchConfig
from orchestration.execution.lock import study_lock
from orchestration.execution.preflight import check_data, check_weights, pack_frames
from orchestration.execution.progress import LiveProgress
from orchestration.execution.prolonging import prolonging_notes
from orchestration.execution.recorder import RunRecorder
from orchestration.execution.recover import finished_here, unrecorded
from orchestration.execution.scheduling import missing_trials, train_missing
from orchestration.execution.signals import graceful_shutdown
from orchestration.execution.webhook import failures_by_kind, notify_webhook
from orchestration.failures import REMEDIES
from orchestration.installation import packaged
from orchestration.reporting.study_report import write_report
from orchestration.reporting.study_results import StudyResults
from orchestration.reporting.table_formats import FORMATS
from orchestration.reporting.tables import table_info
from orchestration.studies.best import best_of_study
from orchestration.studies.budget import Budget, Order, in_order, uses
from orchestration.studies.loader import fetch_weights
from orchestration.studies.matching import match
from orchestration.studies.trial import Study, Trial
from orchestration.tracking.store import Store


@dataclass(frozen=True)
class _Plan:
    """The trials that a launch of a study is to run."""

    missing: Sequence[Trial]
    """Trials to train or to test."""
    num_finished: int
    num_over_budget: int


def run_study(
    study: Study,
    launch: LaunchConfig,
    budget: Budget | None = None,
    order: Order = "file",
    among: Sequence[Study] = (),
) -> None:
    """Run a study, and print its table.

    With a ``budget``, only those missing trials run that fit it, in that ``order``. ``among`` are
    the studies of which ``order: shared`` counts how many need a training.

    Raises:
        UserError: the data is missing, another launch runs the study, or a trial does not fit the
            cluster.
        Failure: a trial failed permanently, or the study was stopped; the table shows what is
            finished.
    """
    console = Console(soft_wrap=True)
    # The names of the stop file and of the lock follow from the study's.
    launch = replace(launch, study=study.name)
    # First: a trial's identity contains the content of the weights it starts from.
    fetch_weights(study)
    with study_lock(study, launch):
        # Inside the lock: what an earlier launch finished is in MLflow by now.
        store = Store(launch)
        _mention_unrecorded(launch, store)
        plan = _plan(study, store, budget, order, among)
        lines = prolonging_notes(plan.missing, store.trials(), launch)
        for line in [f"{study.file.title}: {_counts(study, plan)}", *lines]:
            console.print(line, markup=False)
        pack_frames(plan.missing, launch)
        progress = LiveProgress(list(plan.missing), plan.num_finished, console)
        with RunRecorder(study, store, progress) as recorder, graceful_shutdown(launch):
            try:
                if plan.missing:
                    starts = backend_of(launch).STARTS
                    if starts and not progress.is_live:
                        console.print(starts, markup=False)
                    with progress:
                        train_missing(recorder, plan.missing)
            # Also after an error: the trials that are finished must reach MLflow.
            finally:
                _finalize(recorder)
            folder = launch.report_folder(study.name)
            # Read again: MLflow now has the runs of this launch.
            results = StudyResults.match(study, store.trials(), store.file_of)
            best = best_of_study(study, results.runs)
            recorder.mark_best(best)
            table, lines = write_report(results, folder)
            recorder.log_report(folder, results, table)
    # The report has all rows; the terminal shows those that ``--filter`` chose.
    if study.chosen is not None:
        chosen = replace(study, trials=study.to_run)
        table = FORMATS["md"](table_info(results.of(chosen)))
    print(f"\n{table}")
    print("\n".join([*lines, ""]))
    _print_where(study, launch, has_model=best is not None)
    # Outside the lock: no other launch waits for a webhook that does not answer.
    notify_webhook(study, recorder)
    _raise_if_unfinished(study, recorder)


def _plan(
    study: Study, store: Store, budget: Budget | None, order: Order, among: Sequence[Study]
) -> _Plan:
    """Return which trials are to run, after checks of their data and weights.

    Raises:
        UserError: the data is missing, or the weights do not fit.
    """
    missing = missing_trials(study, store)
    if order != "file":
        # Only then: it reads the identities of all these studies' trials.
        missing = in_order(missing, order, uses(among))
    wanted = missing
    if budget:
        wanted = budget.take(study, missing, store.trials())
    check_data(wanted)
    check_weights(wanted)
    # By key: several rows of a study may be one trial.
    num_finished = len({trial.key for trial in study.to_run}) - len(missing)
    return _Plan(wanted, num_finished, len(missing) - len(wanted))


def _counts(study: Study, plan: _Plan) -> str:
    counts = (
        f"{len(study.to_run)} trials, {plan.num_finished} finished before, "
        f"{len(plan.missing)} to train"
    )
    if plan.num_over_budget:
        counts += f", {plan.num_over_budget} left out: over the budget"
    return counts


def _print_where(study: Study, launch: LaunchConfig, has_model: bool) -> None:
    """Print where the results are, and how to use the best model."""
    folder = launch.report_folder(study.name)
    print(f"figure   {folder / 'figure.png'}")
    print(f"report   {folder / 'report.html'} (and report.md, table.tex, …)")
    print(f"MLflow   {_mlflow_hint(launch)}   (experiment {study.name!r})")
    if has_model and study.path is not None:
        verb = "predict"
        # A pre-training has no classifier.
        if study.trials[0].settings.pretrains:
            verb = "reconstruct"
        print(f"use it   mar {verb} {_as_typed(study.path)} --best{_store_option(launch)} VIDEO")


def _mlflow_hint(launch: LaunchConfig) -> str:
    """Return where MLflow shows the study: a server's address, or the command that starts one."""
    if launch.tracking_uri:
        return launch.shown_tracking
    return f"mar ui{_store_option(launch)}"


def _store_option(launch: LaunchConfig) -> str:
    """Return what a command needs to read this launch's store: nothing for the default one."""
    option = ""
    if launch.store != DEFAULT_STORE:
        option = f" --store {shlex.quote(str(launch.store))}"
    if launch.tracking_uri:
        option += f" --tracking-uri {launch.shown_tracking}"
    return option


def _as_typed(file: Path) -> str:
    """Return a study's name for a command: of a shipped one its name, of another its path."""
    spaces = packaged("search_spaces").resolve()
    if file.is_relative_to(spaces):
        return shlex.quote(str(file.relative_to(spaces).with_suffix("")))
    return shlex.quote(os.path.relpath(file))


def _raise_if_unfinished(study: Study, recorder: RunRecorder) -> None:
    """Print the trials that failed, by kind, with the remedies.

    Raises:
        Failure: a trial failed, or the study was stopped.
    """
    if recorder.failures:
        for kind, names in failures_by_kind(recorder).items():
            remedy = REMEDIES[kind]
            # Not str.capitalize(), which would write the names in it in lower case.
            remedy = remedy[0].upper() + remedy[1:]
            print(f"{kind:<8} {len(names)} trials: {', '.join(names)}. {remedy}.")
        left = ""
        if recorder.is_over() and recorder.num_left:
            left = f", {recorder.num_left} not started"
        raise Failure(
            f"{len(recorder.failures)} of {len(study.trials)} trials failed{left}; "
            "run the same command to resume"
        )
    if recorder.was_stopped:
        raise Failure(
            f"stopped with {recorder.num_left} trials unfinished; run the same command to resume",
            "stopped",
        )


def _finalize(recorder: RunRecorder) -> None:
    """Wait until MLflow has everything.

    If it does not answer in time, print the table from the results on this disk.

    Raises:
        Failure: the tracking store was not back in time.
    """
    try:
        recorder.finalize()
    except Failure as error:
        study = recorder.study
        store = recorder.store
        # Each key once, in the study's order.
        keys = dict.fromkeys(trial.key for trial in study.trials)
        results = StudyResults.match(study, finished_here(store.launch, keys), store.file_of)
        print(f"\n{FORMATS['md'](table_info(results))}")
        raise Failure(
            f"{error}. The table above is from the results in the store; the same command records "
            "them in MLflow when it is back, or, without --tracking-uri, here"
        ) from None


def _mention_unrecorded(launch: LaunchConfig, store: Store) -> None:
    """Print a note if the store has results that its database does not know.

    This is so where the database was lost.
    """
    lost = unrecorded(launch, {record.key for record in store.trials()})
    if lost:
        notice(
            f"{len(lost)} finished results in {launch.store / 'trials'} are not in the tracking "
            "store. Those of this study are used, not trained again; "
            f"mar recover --store {launch.store} records all"
        )


def run_studies(
    studies: Sequence[Study],
    launch: LaunchConfig,
    budget: Budget | None = None,
    order: Order = "file",
) -> None:
    """Run studies one after the other in one Ray; the next ones reuse what earlier ones trained.

    Raises:
        Failure: a study has trials that failed; the others were run.
        UserError: a study could not start; the others were run.
    """
    records = Store(launch).trials()
    before = {record.run_id for record in records if record.status == "FINISHED"}
    if budget or order != "file":
        for study in studies:
            # What cannot be fetched is an error of its own study, which runs into it below.
            with suppress(UserError):
                fetch_weights(study)
    if budget:
        print(budget.choose(studies, records, order))
    began = time.monotonic()
    errors: list[Failure | UserError] = []
    messages: list[str] = []
    is_stopped = False
    with backend_of(launch).session(launch):
        for study in studies:
            try:
                run_study(study, launch, budget, order, studies)
            # A study that fails must not keep the next ones from running.
            except (Failure, UserError) as error:
                errors.append(error)
                messages.append(f"{study.name}: {error}")
                print(f"mar: {messages[-1]}")
                is_stopped = isinstance(error, Failure) and error.kind == "stopped"
            # A request to stop one study stops all of them.
            if is_stopped:
                break
    _print_summary(studies, launch, before, (time.monotonic() - began) / 60)
    if is_stopped:
        raise Failure("stopped; run the same command to resume", "stopped")
    if messages:
        text = f"{len(messages)} of {len(studies)} studies are incomplete: {'; '.join(messages)}"
        # Exit code 2 only if every error is the user's to correct.
        if all(isinstance(error, UserError) for error in errors):
            raise UserError(text)
        raise Failure(text)


def _print_summary(
    studies: Sequence[Study], launch: LaunchConfig, before: set[str], minutes: float
) -> None:
    """Print how many trials were trained and tested.

    ``before`` has the ids of the runs that were finished at the start.
    """
    records = Store(launch).trials()
    new = [
        record for record in records if record.run_id not in before and record.status == "FINISHED"
    ]
    # A run of a trial that was only tested has no model of its own.
    num_trained = sum(record.was_trained for record in new)
    trials = [trial for study in studies for trial in study.trials]
    num_missing = len({trial.key for trial in trials}) - len(match(trials, records))
    print(
        f"{len(studies)} studies, {len(trials)} rows: {num_trained} trained and "
        f"{len(new) - num_trained} tested in "
        f"{minutes:.1f} min; {num_missing} trials are missing, all other rows were finished "
        "before or are shared"
    )
