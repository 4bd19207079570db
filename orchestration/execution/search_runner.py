"""``mar run`` of a search: propose, train, tell; then what was found."""

from __future__ import annotations

import shlex

from rich.console import Console

from mar import RESULT_DIR
from mar.errors import Failure
from mar.safe_input import read_json
from orchestration.config import LaunchConfig, sqlite_address
from orchestration.execution.lock import study_lock
from orchestration.execution.preflight import check_data, check_weights
from orchestration.execution.progress import LiveProgress
from orchestration.execution.recorder import RunRecorder
from orchestration.execution.signals import graceful_shutdown
from orchestration.execution.webhook import notify_webhook
from orchestration.failures import FailureReason
from orchestration.reporting.search_report import found_text, write_search_report
from orchestration.search.optuna_search import OptunaSearch, open_search
from orchestration.search.schema import Search
from orchestration.studies.loader import fetch_weights
from orchestration.studies.schema import StudyFile
from orchestration.studies.trial import Study, Trial
from orchestration.tracking.store import Store


def run_search(search: Search, launch: LaunchConfig) -> None:
    """Run a search until it has its number of trials; one that was killed goes on.

    Raises:
        UserError: the data is not there, another run of the search is alive, a trial does not fit the cluster.
        Failure: trials failed, or nothing keeps the constraints; what was found is printed.
    """
    console, launch = Console(soft_wrap=True), launch.model_copy(update={"study": search.name})
    study = Study(
        search.name,
        StudyFile(title=search.file.title, recipe=search.file.recipe, axes={"trial": {}}),
        [],
    )
    with study_lock(study, launch):
        store = Store(launch)
        sample = Trial({"trial": "–"}, search.settings({}), "")
        fetch_weights(Study(search.name, study.file, [sample]))
        check_data([sample])
        check_weights([sample])
        proposer = open_search(
            search, launch.store.resolve() / "searches" / f"{search.name}.db", store.trials()
        )
        counts = f"{search.file.trials} trials wanted, {proposer.num_done} there"
        console.print(f"{search.file.title}: {counts}", markup=False)
        progress = LiveProgress([], proposer.num_done, console)
        with (
            RunRecorder(study, store, progress, list(search.file.space)) as recorder,
            graceful_shutdown(launch),
        ):
            try:
                with progress:
                    _train(_Searching(recorder, proposer, progress), launch)
            finally:
                recorder.finalize()
            was_stopped = recorder.was_stopped or (
                launch.stop_file.exists() and proposer.num_left > 0
            )
            folder = launch.report_folder(search.name)
            write_search_report(proposer, folder)
            recorder.log_report(folder, [], found_text(proposer))
    print(f"\n{found_text(proposer)}")
    print(f"report   {folder / 'report.md'} (best.yaml, front.csv, trials.csv, pictures)")
    print(
        f"Optuna   optuna-dashboard {shlex.quote(sqlite_address(launch.store.resolve() / 'searches' / f'{search.name}.db'))}"
        f"   (study {proposer.study.study_name})"
    )
    notify_webhook(study, recorder)
    if was_stopped:
        raise Failure("stopped; run the same command to go on", "stopped")
    if recorder.failures:
        raise Failure(
            f"{len(recorder.failures)} trials failed, the first: {next(iter(recorder.failures.values()))}"
        )


def _train(searching: _Searching, launch: LaunchConfig) -> None:
    if launch.backend == "local":
        from orchestration.backends import local

        local.run_search(searching.proposer, launch, searching, searching.announce)
    else:
        from orchestration.backends import ray_tune

        ray_tune.run_search(searching.proposer, launch, searching, searching.announce)


class _Searching:
    """Hears from the backend: tells MLflow as any launch does, and Optuna."""

    def __init__(
        self, recorder: RunRecorder, proposer: OptunaSearch, progress: LiveProgress
    ) -> None:
        self.recorder, self.proposer, self.progress = recorder, proposer, progress

    def announce(self, trial: Trial) -> None:
        """Expect a trial."""
        self.recorder.announce(trial)
        self.progress.announce(trial)

    def started(self, key: str) -> None:
        """A trial runs."""
        self.recorder.started(key)

    def epoch(self, key: str, epoch: int, metrics: dict[str, float]) -> None:
        """A trial finished an epoch."""
        self.recorder.epoch(key, epoch, metrics)

    def finished(self, key: str) -> None:
        """A trial is done; or it was ended early and had a result before it heard of that, which does not count."""
        if key in self.proposer.pruned:
            self.failed(key, FailureReason("ended early"))
            return
        self.recorder.finished(key)
        file = self.recorder.store.launch.trial_folder(key) / RESULT_DIR / "metrics.json"
        metrics: dict[str, float] = read_json(file)
        try:
            self.proposer.finished(key, metrics, self.recorder.trials[key].settings)
        except Failure as error:
            self.recorder.failures[key] = FailureReason(str(error), "user")

    def failed(self, key: str, reason: FailureReason) -> None:
        """A trial was given up, or ended early."""
        if key in self.proposer.pruned:
            self.recorder.pruned(key, "ended early: others were better at this epoch")
            return
        self.recorder.failed(key, reason)
        if reason.kind != "disk":  # with room, the same proposal is trained on
            self.proposer.failed(key)

    def is_over(self) -> bool:
        """Whether no other trial is to begin."""
        return self.recorder.is_over()
