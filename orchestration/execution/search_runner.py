"""``mar run`` of a search: propose, train, tell; then what was found."""

from __future__ import annotations

import shlex

from rich.console import Console

from mar import RESULT
from mar.errors import Failure
from mar.safe_input import read_json
from orchestration.config import LaunchConfig, sqlite_address
from orchestration.execution.lock import only_one
from orchestration.execution.preflight import check_data, check_weights
from orchestration.execution.progress import Board
from orchestration.execution.recorder import Launch
from orchestration.execution.signals import stopping_gently
from orchestration.execution.webhook import tell_webhook
from orchestration.failures import Reason
from orchestration.reporting.search_report import found_text, write_search_report
from orchestration.search.optuna_search import Proposer, open_search
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
    with only_one(study, launch):
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
        board = Board([], proposer.num_done, console)
        with (
            Launch(study, store, board, list(search.file.space)) as launched,
            stopping_gently(launch),
        ):
            try:
                with board:
                    _train(_Searching(launched, proposer, board), launch)
            finally:
                launched.settle()
            was_stopped = launched.was_stopped or (
                launch.stop_file.exists() and proposer.num_left > 0
            )
            folder = launch.report_folder(search.name)
            write_search_report(proposer, folder)
            launched.keep(folder, [], found_text(proposer))
    print(f"\n{found_text(proposer)}")
    print(f"report   {folder / 'report.md'} (best.yaml, front.csv, trials.csv, pictures)")
    print(
        f"Optuna   optuna-dashboard {shlex.quote(sqlite_address(launch.store.resolve() / 'searches' / f'{search.name}.db'))}"
        f"   (study {proposer.study.study_name})"
    )
    tell_webhook(study, launched)
    if was_stopped:
        raise Failure("stopped; run the same command to go on", "stopped")
    if launched.failures:
        raise Failure(
            f"{len(launched.failures)} trials failed, the first: {next(iter(launched.failures.values()))}"
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

    def __init__(self, launched: Launch, proposer: Proposer, board: Board) -> None:
        self.launched, self.proposer, self.board = launched, proposer, board

    def announce(self, trial: Trial) -> None:
        """Expect a trial."""
        self.launched.announce(trial)
        self.board.announce(trial)

    def started(self, key: str) -> None:
        """A trial runs."""
        self.launched.started(key)

    def epoch(self, key: str, epoch: int, metrics: dict[str, float]) -> None:
        """A trial finished an epoch."""
        self.launched.epoch(key, epoch, metrics)

    def finished(self, key: str) -> None:
        """A trial is done; or it was ended early and had a result before it heard of that, which does not count."""
        if key in self.proposer.ended:
            self.failed(key, Reason("ended early"))
            return
        self.launched.finished(key)
        file = self.launched.store.launch.trial_folder(key) / RESULT / "metrics.json"
        metrics: dict[str, float] = read_json(file)
        try:
            self.proposer.finished(key, metrics, self.launched.trials[key].settings)
        except Failure as error:
            self.launched.failures[key] = Reason(str(error), "user")

    def failed(self, key: str, reason: Reason) -> None:
        """A trial was given up, or ended early."""
        if key in self.proposer.ended:
            self.launched.ended(key, "ended early: others were better at this epoch")
            return
        self.launched.failed(key, reason)
        if reason.kind != "disk":  # with room, the same proposal is trained on
            self.proposer.failed(key)

    def is_over(self) -> bool:
        """Whether no other trial is to begin."""
        return self.launched.is_over()
