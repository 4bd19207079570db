"""Records one launch of a study in MLflow, and updates the progress display.

MLflow is decisive: a trial counts as finished when its run in MLflow has the status FINISHED.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from mar.atomic_dir import atomic_write
from mar.config.overrides import flatten, without_paths
from mar.errors import Failure, UserError, notice
from mar.model.flops import cost
from mar.safe_input import read_json
from mar.training.reports import EpochReport
from mar.training.retention import RetentionPolicy, prune
from orchestration.execution.run_tags import trial_tags, write_record
from orchestration.failures import FailureReason
from orchestration.reporting.study_results import StudyResults
from orchestration.storage.object_store import open_object_store
from orchestration.storage.trial_dir import TrialDir
from orchestration.storage.trial_sync import prune_remote_checkpoints
from orchestration.studies.metrics import METRICS
from orchestration.studies.trial import Study, Trial
from orchestration.tracking import provenance
from orchestration.tracking.models import source_run
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store
from orchestration.tracking.tags import (
    EXPECTED,
    FAILURE,
    FAILURE_KIND,
    KEY,
    KIND,
    MICROBATCH_CLIPS,
    OVERRIDES,
    PRUNED,
    RUNS,
    STUDY,
    TITLE,
)
from orchestration.tracking.writer import Writer

_MOST_NOTE = 4900
"""Characters; MLflow refuses a tag of 5,000 or more on some stores."""
_MOST_FAILURE = 4000
"""Characters of a failure's message that are kept in a tag."""
_PARENT = "study"
"""The writer's key of the study's own run."""


class ProgressReporter(Protocol):
    """Shows a launch to a person; ``LiveProgress`` is one."""

    def started(self, trial: Trial, epochs_done: int = 0) -> None:
        """Show that a trial runs; ``epochs_done`` were finished in earlier launches."""

    def waits(self, trial: Trial) -> None:
        """Show that a trial waits to be started again."""

    def epoch(self, trial: Trial, report: EpochReport) -> None:
        """Show an epoch that a trial reports for the first time, or its test."""

    def finished(self, trial: Trial, metrics: dict[str, float]) -> None:
        """Show that a trial is done."""

    def failed(self, trial: Trial, reason: str) -> None:
        """Show that a trial failed permanently, and why."""

    def pruned(self, trial: Trial, message: str) -> None:
        """Show that a trial was pruned."""

    def message(self, trial: Trial, message: str) -> None:
        """Show a message of a trial."""


class RunRecorder:
    """Backend callback that records a study's trials in MLflow and updates the progress display.

    It is the only writer of its study's runs.
    """

    def __init__(
        self,
        study: Study,
        store: Store,
        progress: ProgressReporter,
        parameters: Sequence[str] = (),
    ) -> None:
        self.study = study
        self.store = store
        self.launch = store.launch
        self.progress = progress
        self.trials = {trial.key: trial for trial in study.trials}
        self.common_tags = {
            STUDY: study.name,
            **provenance.tags(),
            **provenance.source_tags(study.path),
        }
        self.experiment = store.experiment(study.name)
        # A run that is still RUNNING is of a launch that was killed: this launch holds the study's
        # lock, so no other one writes to it.
        store.close_stale(self.experiment)
        # Before anything is trained, so that the disk has the room that old checkpoints take.
        self._prune_leftovers()
        self.parent = self._study_run(parameters)
        self.writer = Writer(store, self.launch.worker.patience_s)
        self.writer.open(_PARENT, lambda: self.parent)
        self.expected: set[str] = set()
        """Keys of the trials that this launch is to run."""
        self.begun: set[str] = set()
        self.waiting: set[str] = set()
        """Keys of the trials that wait to be started again, with a larger share of a GPU."""
        self.done: set[str] = set()
        self.pruned_trials: set[str] = set()
        self.failures: dict[str, FailureReason] = {}
        self.trained_by: dict[str, str] = {}
        """Key of a trial that is only tested -> key of the trial whose model it uses."""
        self._log_position: dict[str, int] = {}
        """Key -> the position in the trial's log up to which it was shown."""

    def _study_run(self, parameters: Sequence[str]) -> str:
        """Find or create the study's own run; returns its id."""
        title = self.study.file.title
        metrics, differing = _columns(self.study)
        self.store.show_columns(self.experiment, metrics, [*parameters, *differing])
        overrides = json.dumps(self.study.overrides, ensure_ascii=False)
        if len(overrides) > _MOST_NOTE:
            overrides = "[]"
        tags = {
            **self.common_tags,
            TITLE: title,
            "mlflow.note.content": title,
            OVERRIDES: overrides,
        }
        return self.store.run(self.experiment, self.study.name, {KIND: "study"}, tags)

    # What a backend reports (``TrialCallback``).

    def started(self, key: str) -> None:
        """Find or create the trial's run, and log its cost."""
        # Its run is open.
        if key in self.waiting:
            self.waiting.discard(key)
            trial_dir = self._trial_dir(key)
            self.progress.started(self.trials[key], trial_dir.num_epochs_done())
            return
        # Tune also calls this when it starts a trial again after it lost its process.
        if key in self.begun:
            return
        self.begun.add(key)
        trial = self.trials[key]
        trial_dir = self._trial_dir(key)
        # The workers that take a new trial have ended the pruned one, and no longer write its
        # checkpoints. What other workers still write is removed by ``finalize``.
        for pruned in self.pruned_trials:
            prune(self._trial_dir(pruned).root, self.launch.worker.keep)
        self.writer.open(key, lambda: self._run_of(trial))
        costs = cost(trial.settings)
        self.writer.log_metrics(
            key, 0, {"cost/gflops": costs.gflops, "cost/params_m": costs.params_m}
        )
        # The log's lines of an earlier launch were shown by that launch.
        self._log_position[key] = 0
        if trial_dir.log.is_file():
            self._log_position[key] = trial_dir.log.stat().st_size
        write_record(trial_dir, self.study.name, trial.name, self._tags_of(trial))
        self.progress.started(trial, trial_dir.num_epochs_done())

    def waits(self, key: str) -> None:
        """Show that a trial waits to be started again."""
        self.waiting.add(key)
        self.progress.waits(self.trials[key])

    def epoch(self, key: str, report: EpochReport) -> None:
        """Log an epoch; the writer drops epochs that were logged before."""
        self.writer.log_report(key, report)
        self._show_log(key)
        if not report.is_replay:
            self.progress.epoch(self.trials[key], report)

    def finished(self, key: str) -> None:
        """Log the final metrics and the result folder, then mark the run as finished."""
        trial_dir = self._trial_dir(key)
        trial = self.trials[key]
        metrics: dict[str, float] = read_json(trial_dir.metrics)
        # The test's report may have been lost with the trial's process; the result has its metrics.
        final = EpochReport(trial.settings.recipe.epochs, metrics, is_final=True)
        self.writer.log_report(key, final)
        # A trial that is only tested has no weights of its own.
        self.writer.result(key, trial_dir.result, has_model=key not in self.trained_by)
        self._log_worker_logs(key)
        # The file exists only where the worker ran out of memory and halved its micro-batch.
        with suppress(OSError, ValueError):
            microbatch = read_json(trial_dir.microbatch)
            clips = str(microbatch["max_microbatch_clips"])
            self.writer.tag(key, MICROBATCH_CLIPS, clips)
        if key not in self.trained_by:
            tested = {
                name: f"{value:.4f}" for name, value in metrics.items() if name.startswith("test/")
            }
            self.writer.register(key, self.study.name, {"trial": trial.name, **tested})
        policy = self.launch.worker.keep
        # The checkpoints are removed only after MLflow has the result. If this launch is killed
        # before that, the next one finds this file and removes them (``_prune_leftovers``).
        with suppress(OSError):
            atomic_write(trial_dir.pruning, json.dumps(asdict(policy)).encode())
        self.writer.end(key, "FINISHED")
        self.writer.after_flush(lambda: self._prune(trial_dir, policy))
        self.done.add(key)
        self._show_log(key)
        self.progress.finished(trial, metrics)

    def failed(self, key: str, reason: FailureReason) -> None:
        """Log the reason, and mark the run as failed."""
        self.failures[key] = reason
        # A trial whose source trial failed was never started, so it has no run.
        if key in self.begun:
            self.writer.tag(key, FAILURE, reason.message[:_MOST_FAILURE])
            self.writer.tag(key, FAILURE_KIND, reason.kind)
            self._log_worker_logs(key)
            self.writer.end(key, "FAILED")
        self.progress.failed(self.trials[key], reason.message)

    def pruned(self, key: str) -> None:
        """Mark a trial that was pruned.

        Its checkpoints are removed later, when its workers no longer write them.
        """
        message = "pruned: others were better at this epoch"
        self.pruned_trials.add(key)
        self.writer.tag(key, PRUNED, message)
        self.writer.end(key, "KILLED")
        self.progress.pruned(self.trials[key], message)

    def stopped(self, key: str) -> None:
        """Do nothing: ``finalize`` marks the runs of all unfinished trials."""

    def is_over(self) -> bool:
        """Whether no other trial is to start: the disk was full for longer than a launch waits."""
        return any(reason.kind == "disk" for reason in self.failures.values())

    # What a launch asks and records.

    def expect(self, trials: Sequence[Trial], num_finished: int = 0) -> None:
        """Record which trials are to run; ``num_finished`` others are finished already."""
        self.expected |= {trial.key for trial in trials}
        # ``mar status`` derives the number of queued trials from this tag.
        self.writer.tag(_PARENT, EXPECTED, str(len(self.expected) + num_finished))

    def announce(self, trial: Trial) -> None:
        """Add a trial that the study did not list: a search proposes its trials one by one."""
        self.trials[trial.key] = trial
        self.expected.add(trial.key)

    def tested(self, key: str, trained_by: str) -> None:
        """Record that a trial is only tested, with the model of the trial ``trained_by``."""
        self.trained_by[key] = trained_by

    @property
    def unfinished(self) -> list[str]:
        """Keys of the trials that were started and neither finished, failed nor were pruned.

        There are some only where the launch was stopped.
        """
        over = self.done | self.pruned_trials | self.failures.keys()
        return [key for key in self.begun if key not in over]

    @property
    def num_left(self) -> int:
        """How many trials that were to run have not ended."""
        return len(self.expected - self.done - self.pruned_trials - self.failures.keys())

    @property
    def was_stopped(self) -> bool:
        """Whether the launch was stopped before all trials had run."""
        return self.num_left > 0

    def finalize(self) -> None:
        """Write how each trial ended, and wait until MLflow has everything.

        Raises:
            Failure: the tracking store could not be written in time.
        """
        for key in self.unfinished:
            self._log_worker_logs(key)
            self.writer.end(key, "KILLED")
        # The backend has ended, so no worker writes checkpoints of a pruned trial any more.
        for key in self.pruned_trials:
            self._prune(self._trial_dir(key), self.launch.worker.keep)
        self.writer.flush()

    def log_report(self, reports: Path, results: StudyResults | None, note: str) -> None:
        """Log the report's files with the study's run, and the ids of the runs in its table.

        ``note`` becomes the run's description in MLflow: the table.
        """
        runs: dict[str, str] = {}
        if results:
            runs = results.run_ids
        listed = json.dumps(runs, ensure_ascii=False)
        (reports / "runs.json").write_text(listed, encoding="utf-8")
        if len(listed) > _MOST_NOTE:
            listed = "in the artifact report/runs.json"
        self.writer.tag(_PARENT, RUNS, listed)
        page = f"#/experiments/{self.experiment}/runs/{self.parent}/artifacts/report"
        link = f"[Figures, claims, LaTeX: the report]({page})\n\n"
        self.writer.tag(_PARENT, "mlflow.note.content", (link + note)[:_MOST_NOTE])
        self.writer.artifacts(_PARENT, reports, "report")

    def mark_best(self, run: RunRecord | None) -> None:
        """Give the study's best model the alias ``best`` in MLflow; none is no change."""
        if run is None:
            return
        # A trial that was only tested has no model of its own: the best model is the one it tested.
        try:
            source = source_run(run, self.store)
        # That run was deleted from MLflow. The study is complete without the alias.
        except UserError as error:
            notice(f"no alias best: {error}")
            return
        tags = {"trial": source.tags.get("mlflow.runName", "")}
        name = self.study.name
        self.writer.after_flush(lambda: self.store.register(source.run_id, name, tags, "best"))

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the study's run, whatever happened."""
        if self.failures:
            self.writer.end(_PARENT, "FAILED")
        elif kind is None and not self.unfinished:
            self.writer.end(_PARENT, "FINISHED")
        else:
            self.writer.end(_PARENT, "KILLED")
        self.writer.close()

    # How.

    def _trial_dir(self, key: str) -> TrialDir:
        return TrialDir(self.launch.trial_folder(key))

    def _log_worker_logs(self, key: str) -> None:
        """Log the files that the trial's workers wrote as artifacts of its run."""
        trial_dir = self._trial_dir(key)
        if trial_dir.log.is_file():
            self.writer.artifact(key, trial_dir.log)
        if trial_dir.worker_logs.is_dir():
            self.writer.artifacts(key, trial_dir.worker_logs, trial_dir.worker_logs.name)

    def _prune(self, trial_dir: TrialDir, policy: RetentionPolicy) -> None:
        """Remove the checkpoints of an ended trial, but for those that the policy keeps."""
        prune(trial_dir.root, policy)
        object_store = self.launch.worker.object_store
        if object_store:
            # Checkpoints that cannot be removed only take room: no reason to fail the launch.
            with suppress(Failure, OSError):
                store = open_object_store(object_store)
                prune_remote_checkpoints(store, trial_dir.root.name, policy)
        # Last: while the file exists, a later launch removes what is left.
        trial_dir.pruning.unlink(missing_ok=True)

    def _prune_leftovers(self) -> None:
        """Remove the checkpoints of finished trials whose launch was killed before it could."""
        trial_dirs = {key: self._trial_dir(key) for key in self.trials}
        left = {key: each for key, each in trial_dirs.items() if each.pruning.is_file()}
        if not left:
            return
        # Only if MLflow has the result: otherwise the checkpoints are still needed to resume.
        finished = {record.key for record in self.store.trials() if record.status == "FINISHED"}
        for key in finished & left.keys():
            with suppress(OSError, ValueError, TypeError):
                policy = RetentionPolicy(**read_json(left[key].pruning))
                self._prune(left[key], policy)

    def _show_log(self, key: str) -> None:
        """Show the lines that the trial's workers added to its log since the last call."""
        log = self._trial_dir(key).log
        position = self._log_position.get(key, 0)
        if not log.is_file() or log.stat().st_size <= position:
            return
        with log.open(encoding="utf-8") as file:
            file.seek(position)
            for line in file.read().splitlines():
                self.progress.message(self.trials[key], line)
            self._log_position[key] = file.tell()

    def _run_of(self, trial: Trial) -> str:
        """Find or create a trial's run; returns its id."""
        find = {KIND: "trial", KEY: trial.key}
        run_id = self.store.run(self.experiment, trial.name, find, self._tags_of(trial))
        self.store.parameters(run_id, without_paths(trial.settings))
        return run_id

    def _tags_of(self, trial: Trial) -> dict[str, str]:
        folder = str(self.launch.trial_folder(trial.key))
        trained_by = self.trained_by.get(trial.key)
        return trial_tags(trial, self.common_tags, self.parent, folder, trained_by)


def _columns(study: Study) -> tuple[list[str], list[str]]:
    """Return the columns of the study's page in MLflow.

    These are the metrics of its table, and the settings in which its trials differ.
    """
    sources = [METRICS[name].source for name in study.file.table.columns]
    # The number of views is a setting, not a metric of the run.
    metrics = [name.replace("cost.", "cost/") for name in sources if name != "views"]
    trees = [flatten(without_paths(trial.settings)) for trial in study.trials]
    names = dict.fromkeys(name for tree in trees for name in tree)
    differing = [name for name in names if len({str(tree.get(name)) for tree in trees}) > 1]
    return list(dict.fromkeys(metrics)), differing
