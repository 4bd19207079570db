"""One launch of a study: trains what is missing, and writes down what happens.

The record comes first: a trial is known to be finished when MLflow says so, not before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from mar import MANIFEST, RESULT_DIR
from mar.config.overrides import PATH_SETTINGS, flatten, without_paths
from mar.errors import Failure
from mar.model.flops import cost
from mar.safe_input import read_json
from mar.training.retention import RetentionPolicy, prune
from orchestration.failures import FailureReason
from orchestration.storage.object_store import remote
from orchestration.storage.trial_dir import CLEARED, LOG, LOGS, MICROBATCH, RECORD
from orchestration.storage.trial_sync import prune_remote_checkpoints
from orchestration.studies.matching import Record, match
from orchestration.studies.metrics import METRICS
from orchestration.studies.trial import Study, Trial
from orchestration.tracking import provenance
from orchestration.tracking.store import Store
from orchestration.tracking.tags import (
    EXPECTED,
    IDENTITY,
    KEY,
    KIND,
    PARENT_RUN,
    STUDY,
    TRAINED_BY,
    WEIGHTS,
)
from orchestration.tracking.writer import Writer

_MOST_NOTE = 4900
"""Characters; MLflow refuses a tag of 5,000 or more on some stores."""
_PARENT = "study"
"""The writer's key of the study's own run."""


class ProgressReporter(Protocol):
    """Who watches a launch; ``progress.Board`` does."""

    def started(self, trial: Trial, epochs_done: int = 0) -> None:
        """A trial runs; of its epochs so many were finished in earlier launches."""

    def epoch(self, trial: Trial, epoch: int, metrics: dict[str, float]) -> None:
        """It finished an epoch."""

    def finished(self, trial: Trial, metrics: dict[str, float]) -> None:
        """It is done."""

    def failed(self, trial: Trial, reason: str) -> None:
        """It was given up."""

    def pruned(self, trial: Trial, message: str) -> None:
        """It was ended early, on purpose."""

    def message(self, trial: Trial, message: str) -> None:
        """It has a message for a person."""


class RunRecorder:
    """Hears from the backend; tells MLflow and the view. It is the only writer of its study's runs."""

    def __init__(
        self, study: Study, store: Store, view: ProgressReporter, parameters: Sequence[str] = ()
    ) -> None:
        self.study, self.store, self.view = study, store, view
        self.trials = {trial.key: trial for trial in study.trials}
        self.shared = {STUDY: study.name, **provenance.tags()}
        self.experiment = store.experiment(study.name)
        store.close_stale(self.experiment)  # nobody else runs this study: its lock is held
        self._clear_left()
        title = study.file.title
        tags = {**self.shared, "title": title, "mlflow.note.content": title}
        metrics, differing = _columns(study)
        store.show_columns(self.experiment, metrics, [*parameters, *differing])
        self.parent = store.run(self.experiment, study.name, {KIND: "study"}, tags)
        self.writer = Writer(store, store.launch.patience_s)
        self.writer.open(_PARENT, lambda: self.parent)
        self.expected: set[str] = set()
        """Keys of the trials that are to run."""
        self.begun: set[str] = set()
        self.done: set[str] = set()
        self.stopped: set[str] = set()
        self.failures: dict[str, FailureReason] = {}
        self.trained_by: dict[str, str] = {}
        self._relayed: dict[str, int] = {}
        self._shown: dict[str, int] = {}

    def started(self, key: str) -> None:
        """Find or make the trial's run."""
        if key in self.begun:
            return
        self.begun.add(key)
        for pruned in self.stopped:
            prune(self.store.launch.trial_folder(pruned), self.store.launch.keep)
        figures = cost(self.trials[key].settings)
        self.writer.open(key, lambda: self._run_of(self.trials[key]))
        self.writer.metrics(
            key, 0, {"cost/gflops": figures.gflops, "cost/params_m": figures.params_m}
        )
        log = self.store.launch.trial_folder(key) / LOG
        self._relayed[key] = log.stat().st_size if log.is_file() else 0
        self._write_record(self.trials[key])
        epochs_done = _epochs_done(self.store.launch.trial_folder(key))
        self._shown[key] = (
            epochs_done + 1
        )  # what the trial reports of earlier epochs is for MLflow, not for a person
        self.view.started(self.trials[key], epochs_done)

    def expect(self, trials: Sequence[Trial], there: int = 0) -> None:
        """Say what is to run, beside what is there."""
        self.expected |= {trial.key for trial in trials}
        self.writer.tag(_PARENT, EXPECTED, str(len(self.expected) + there))

    def announce(self, trial: Trial) -> None:
        """Expect a trial that the study did not list: a search proposes them one by one."""
        self.trials[trial.key] = trial
        self.expected.add(trial.key)

    def pruned(self, key: str, message: str) -> None:
        """Mark a trial that was ended early, on purpose; its checkpoints go when its workers have left it, and start another."""
        self.stopped.add(key)
        self.writer.tag(key, "ended", message)
        self.writer.end(key, "KILLED")
        self.view.pruned(self.trials[key], message)

    def epoch(self, key: str, epoch: int, metrics: dict[str, float]) -> None:
        """Log an epoch."""
        trained = {name: value for name, value in metrics.items() if not name.startswith("test/")}
        self.writer.metrics(
            key, epoch, trained
        )  # what testing measured is logged when it is finished
        self._relay(key)
        if epoch >= self._shown.get(
            key, 0
        ):  # a trial that goes on tells the epochs before that again
            self._shown[key] = epoch
            self.view.epoch(self.trials[key], epoch, metrics)

    def tested(self, key: str, trained_by: str) -> None:
        """Say whose model a trial is that is tested, not trained."""
        self.trained_by[key] = trained_by

    def finished(self, key: str) -> None:
        """Log the final metrics and the result folder, then mark the run as finished."""
        folder, trial = self.store.launch.trial_folder(key), self.trials[key]
        metrics: dict[str, float] = read_json(folder / RESULT_DIR / "metrics.json")
        final = {name: value for name, value in metrics.items() if name.startswith("test/")}
        self.writer.metrics(key, trial.settings.recipe.epochs, final, again=True)
        self.writer.artifacts(key, folder / RESULT_DIR, RESULT_DIR)
        self._keep_log(key)
        with suppress(OSError, ValueError):
            passes = read_json(folder / MICROBATCH)
            self.writer.tag(key, "max_clips_per_pass", str(passes["max_clips_per_pass"]))
        if key not in self.trained_by:
            shown = {name: f"{value:.4f}" for name, value in final.items()}
            self.writer.register(key, self.study.name, {"trial": trial.name, **shown})
        with suppress(OSError):
            (folder / CLEARED).write_text(
                json.dumps(asdict(self.store.launch.keep)), encoding="utf-8"
            )
        self.writer.end(key, "FINISHED")
        self.writer.after_flush(lambda: self._clear(folder, self.store.launch.keep))
        self.done.add(key)
        self._relay(key)
        self.view.finished(trial, metrics)

    def failed(self, key: str, reason: FailureReason) -> None:
        """Log why, and mark the run as failed."""
        self.failures[key] = reason
        if key in self.begun:
            self.writer.tag(key, "failure", reason.message[:4000])
            self.writer.tag(key, "failure.kind", reason.kind)
            self._keep_log(key)
            self.writer.end(key, "FAILED")
        self.view.failed(self.trials[key], reason.message)

    def is_over(self) -> bool:
        """Whether no other trial is to begin: the disk is full, and nobody made room for a while."""
        return any(reason.kind == "disk" for reason in self.failures.values())

    @property
    def unfinished(self) -> list[str]:
        """Trials that were started and neither finished nor failed: somebody stopped the launch."""
        return [
            key for key in self.begun if key not in self.done | self.stopped | self.failures.keys()
        ]

    @property
    def num_left(self) -> int:
        """Trials that were to run and have no result."""
        return len(self.expected - self.done - self.stopped - self.failures.keys())

    @property
    def was_stopped(self) -> bool:
        """Whether somebody stopped the launch before all that was to run had run."""
        return self.num_left > 0

    def finalize(self) -> None:
        """Write down what the trials came to; after this, MLflow can be read."""
        for key in self.unfinished:
            self._keep_log(key)
            self.writer.end(key, "KILLED")
        for key in self.stopped:
            self._clear(self.store.launch.trial_folder(key), self.store.launch.keep)
        self.writer.flush()

    def log_report(self, reports: Path, records: Sequence[Record], note: str) -> None:
        """Log the report's files with the study's run, and which runs its table is made of, of whatever study.

        ``note`` is what MLflow shows as the run's description: the table.
        """
        found = match(self.study.trials, records)
        runs = {
            trial.name: found[trial.key].run_id for trial in self.study.trials if trial.key in found
        }
        listed = json.dumps(runs, ensure_ascii=False)
        (reports / "runs.json").write_text(listed, encoding="utf-8")
        self.writer.tag(
            _PARENT,
            "runs",
            listed if len(listed) <= _MOST_NOTE else "in the artifact report/runs.json",
        )
        page = f"#/experiments/{self.experiment}/runs/{self.parent}/artifacts/report"
        link = f"[Figures, claims, LaTeX: the report]({page})\n\n"
        self.writer.tag(_PARENT, "mlflow.note.content", (link + note)[:_MOST_NOTE])
        self.writer.artifacts(_PARENT, reports, "report")

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the study's run, whatever happened."""
        is_whole = kind is None and not self.failures and not self.unfinished
        self.writer.end(
            _PARENT, "FINISHED" if is_whole else "FAILED" if self.failures else "KILLED"
        )
        self.writer.close()

    def _keep_log(self, key: str) -> None:
        """Keep what its workers said with the run."""
        folder = self.store.launch.trial_folder(key)
        if (folder / LOG).is_file():
            self.writer.artifact(key, folder / LOG)
        if (folder / LOGS).is_dir():
            self.writer.artifacts(key, folder / LOGS, LOGS)

    def _clear(self, folder: Path, keep: RetentionPolicy) -> None:
        """Remove the checkpoints of a trial that MLflow knows to be finished, but for those that are kept."""
        launch = self.store.launch
        prune(folder, keep)
        if launch.remote:
            with suppress(Failure, OSError):  # they only take room
                prune_remote_checkpoints(remote(launch.remote), folder.name, keep)
        (folder / CLEARED).unlink(missing_ok=True)

    def _clear_left(self) -> None:
        """Remove the checkpoints of finished trials whose launch was killed before it could."""
        folders = {key: self.store.launch.trial_folder(key) for key in self.trials}
        left = {key: folder for key, folder in folders.items() if (folder / CLEARED).is_file()}
        if not left:
            return
        finished = {record.key for record in self.store.trials() if record.status == "FINISHED"}
        for folder in (left[key] for key in finished & left.keys()):
            with suppress(OSError, ValueError, TypeError):
                self._clear(folder, RetentionPolicy(**read_json(folder / CLEARED)))

    def _relay(self, key: str) -> None:
        """Tell the view what the trial's workers have said since."""
        log = self.store.launch.trial_folder(key) / LOG
        if log.is_file() and log.stat().st_size > self._relayed.get(key, 0):
            with log.open(encoding="utf-8") as file:
                file.seek(self._relayed.get(key, 0))
                for line in file.read().splitlines():
                    self.view.message(self.trials[key], line)
                self._relayed[key] = file.tell()

    def _run_of(self, trial: Trial) -> str:
        tags = self._tags_of(trial)
        run_id = self.store.run(self.experiment, trial.name, {KIND: "trial", KEY: trial.key}, tags)
        self.store.parameters(run_id, without_paths(trial.settings))
        return run_id

    def _tags_of(self, trial: Trial) -> dict[str, str]:
        data = trial.settings.data
        figures = cost(trial.settings)
        return {
            **self.shared,
            IDENTITY: trial.identity,
            PARENT_RUN: self.parent,
            "labels": json.dumps(dict(trial.labels), ensure_ascii=False),
            "seed": str(trial.settings.seed),
            "cost.gflops": f"{figures.gflops:.4f}",
            "cost.params_m": f"{figures.params_m:.4f}",
            "folder": str(self.store.launch.trial_folder(trial.key)),
            **({TRAINED_BY: self.trained_by[trial.key]} if trial.key in self.trained_by else {}),
            **({WEIGHTS: trial.settings.encoder.weights} if trial.settings.encoder.weights else {}),
            **{f"data.{name}": str(getattr(data, name)) for name in PATH_SETTINGS},
        }

    def _write_record(self, trial: Trial) -> None:
        """Leave beside a trial's result what its run is made from: the database may be lost (``mar recover``)."""
        folder = self.store.launch.trial_folder(trial.key)
        tags = {name: value for name, value in self._tags_of(trial).items() if name != PARENT_RUN}
        record = {"study": self.study.name, "name": trial.name, "tags": tags}
        with suppress(OSError):  # on a full disk the trial itself has more to say
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECORD).write_text(
                json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8"
            )


def _epochs_done(folder: Path) -> int:
    """Return how many epochs a trial's newest checkpoint here has behind it; 0 where there is none."""
    for manifest in sorted(folder.glob(f"step_*/{MANIFEST}"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return len(read_json(manifest)["progress"]["history"])
    return 0


def _columns(study: Study) -> tuple[list[str], list[str]]:
    """Return the metrics of the study's table and the settings in which its trials differ: what a person looks for."""
    sources = [METRICS[name].source for name in study.file.table.columns]
    metrics = list(
        dict.fromkeys(name.replace("cost.", "cost/") for name in sources if name != "views")
    )
    trees = [flatten(without_paths(trial.settings)) for trial in study.trials]
    names = list(dict.fromkeys(name for tree in trees for name in tree))
    return metrics, [name for name in names if len({str(tree.get(name)) for tree in trees}) > 1]
