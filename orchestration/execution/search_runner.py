"""``mar run`` of a search: proposes trials, trains them, and reports their results to Optuna.

At the end it prints what was found.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mar.errors import Failure
from mar.safe_input import read_json
from mar.training.reports import EpochReport
from orchestration.backends.choice import backend_of
from orchestration.config import LaunchConfig, sqlite_address
from orchestration.execution.lock import study_lock
from orchestration.execution.preflight import check_data, check_weights, pack_frames
from orchestration.execution.progress import LiveProgress
from orchestration.execution.recorder import RunRecorder
from orchestration.execution.signals import graceful_shutdown
from orchestration.execution.webhook import notify_webhook
from orchestration.failures import FailureReason
from orchestration.reporting.search_report import found_text, write_search_report
from orchestration.search.optuna_search import OptunaSearch, open_search
from orchestration.search.schema import Search
from orchestration.storage.trial_dir import TrialDir
from orchestration.studies.best import best_by
from orchestration.studies.loader import fetch_weights
from orchestration.studies.schema import StudyFile
from orchestration.studies.trial import Study, Trial
from orchestration.tracking.store import Store


def run_search(search: Search, launch: LaunchConfig) -> None:
    """Run a search until it has its number of trials; one that was killed resumes.

    Raises:
        UserError: the data is missing, another launch runs the search, or a trial does not fit the
            cluster.
        Failure: trials failed, or no point satisfies the constraints; what was found is printed.
    """
    console = Console(soft_wrap=True)
    launch = replace(launch, study=search.name)
    # In MLflow a search is a study of its own name, with trials that come one by one.
    file = StudyFile(title=search.file.title, recipe=search.file.recipe, axes={"trial": {}})
    study = Study(search.name, file, [])
    with study_lock(study, launch):
        store = Store(launch)
        _check(search, study, launch)
        optuna_file = _optuna_file(search, launch)
        # Results that MLflow has already answer proposals, without another training.
        optuna_search = open_search(search, optuna_file, store.trials())
        console.print(
            f"{search.file.title}: {search.file.trials} trials wanted, "
            f"{optuna_search.num_done} finished",
            markup=False,
        )
        progress = LiveProgress([], optuna_search.num_done, console)
        with (
            RunRecorder(study, store, progress, list(search.file.space)) as recorder,
            graceful_shutdown(launch),
        ):
            try:
                with progress:
                    _train(SearchRecorder(recorder, optuna_search, progress), launch)
            # Also after an error: the trials that are finished must reach MLflow.
            finally:
                recorder.finalize()
            # Asked between two trials, a search stops without an unfinished one. Inside the lock,
            # which removes the stop file when it is released.
            is_asked_to_stop = launch.stop_file.exists() and optuna_search.num_left > 0
            was_stopped = recorder.was_stopped or is_asked_to_stop
            folder = launch.report_folder(search.name)
            metric, direction = next(iter(search.file.objectives.items()))
            done = [run for run in store.trials() if run.experiment == study.name]
            finished = [run for run in done if run.status == "FINISHED"]
            recorder.mark_best(best_by(metric, direction == "max", finished))
            write_search_report(optuna_search, folder)
            recorder.log_report(folder, None, found_text(optuna_search))
    print(f"\n{found_text(optuna_search)}")
    print(f"report   {folder / 'report.md'} (best.yaml, front.csv, trials.csv, pictures)")
    print(
        f"Optuna   optuna-dashboard {shlex.quote(sqlite_address(optuna_file))}"
        f"   (study {optuna_search.study.study_name})"
    )
    notify_webhook(study, recorder)
    if was_stopped:
        raise Failure("stopped; run the same command to resume", "stopped")
    if recorder.failures:
        first = next(iter(recorder.failures.values()))
        raise Failure(f"{len(recorder.failures)} trials failed, the first: {first}")


def _check(search: Search, study: Study, launch: LaunchConfig) -> None:
    """Check data and weights and pack the frames; all trials share those of the recipe.

    Raises:
        UserError: they are missing, or do not fit.
    """
    sample = Trial({"trial": "–"}, search.settings({}), "")
    fetch_weights(Study(search.name, study.file, [sample]))
    check_data([sample])
    check_weights([sample])
    pack_frames([sample], launch)


def _optuna_file(search: Search, launch: LaunchConfig) -> Path:
    """Return the database of the search's Optuna study."""
    return launch.store.resolve() / "searches" / f"{search.name}.db"


def _train(callback: SearchRecorder, launch: LaunchConfig) -> None:
    """Train what Optuna proposes on the launch's backend."""
    source = callback.optuna_search
    backend_of(launch).run_search(source, launch, callback, callback.announce)


class SearchRecorder:
    """Backend callback of a search.

    It records trials in MLflow as any launch does, and reports results to Optuna.
    """

    def __init__(
        self, recorder: RunRecorder, optuna_search: OptunaSearch, progress: LiveProgress
    ) -> None:
        self.recorder = recorder
        self.optuna_search = optuna_search
        self.progress = progress

    def announce(self, trial: Trial) -> None:
        """Add a trial that was proposed."""
        self.recorder.announce(trial)
        self.progress.announce(trial)

    def started(self, key: str) -> None:
        """Record that a trial runs."""
        self.recorder.started(key)

    def waits(self, key: str) -> None:
        """Show that a trial waits to be started again; for Optuna it still runs."""
        self.recorder.waits(key)

    def epoch(self, key: str, report: EpochReport) -> None:
        """Record an epoch; Optuna gets it when the backend asks whether to prune."""
        self.recorder.epoch(key, report)

    def finished(self, key: str) -> None:
        """Record a complete result, and report its objectives to Optuna."""
        self.recorder.finished(key)
        trial_dir = TrialDir(self.recorder.launch.trial_folder(key))
        metrics: dict[str, float] = read_json(trial_dir.metrics)
        settings = self.recorder.trials[key].settings
        # A result may lack an objective: memory, for example, is measured on GPUs only.
        try:
            self.optuna_search.finished(key, metrics, settings)
        except Failure as error:
            self.recorder.failures[key] = FailureReason(str(error), "user")

    def failed(self, key: str, reason: FailureReason) -> None:
        """Record that a trial failed permanently."""
        self.recorder.failed(key, reason)
        # Optuna must not count a trial that a full disk stopped: when the disk has room again, the
        # same proposal is trained.
        if reason.kind != "disk":
            self.optuna_search.failed(key)

    def pruned(self, key: str) -> None:
        """Record that a trial was pruned; Optuna knows it already."""
        self.recorder.pruned(key)

    def stopped(self, key: str) -> None:
        """Record that a trial saved and stopped; the next launch proposes it again."""
        self.recorder.stopped(key)

    def is_over(self) -> bool:
        """Whether no other trial is to start."""
        return self.recorder.is_over()
