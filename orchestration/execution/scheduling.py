"""Decides which trials of a study are trained, which are only tested, and in which order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mar import MANIFEST, RESULT_DIR
from mar.config.mask_settings import EvaluationMaskConfig
from mar.config.schedule import stable_epochs
from orchestration.backends.base import TrainedResults
from orchestration.backends.choice import backend_of
from orchestration.execution.recorder import RunRecorder
from orchestration.failures import FailureReason
from orchestration.storage.object_store import ObjectStore, open_object_store
from orchestration.studies.identity import stable_identity
from orchestration.studies.matching import match, match_training
from orchestration.studies.trial import Study, Trial
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store


def missing_trials(study: Study, store: Store) -> list[Trial]:
    """Return the trials without a finished run, each once, in the study's order.

    A run of any study counts.
    """
    # Such a study only draws pictures of masks, which need no model.
    if not study.trains:
        return []
    found = match(study.to_run, store.trials())
    return list({trial.key: trial for trial in study.to_run if trial.key not in found}.values())


def train_missing(recorder: RunRecorder, trials: Sequence[Trial]) -> None:
    """Train the trials, then test those that share another's training.

    Failures are in ``recorder.failures``.

    Raises:
        UserError: one trial asks for more than the cluster has.
    """
    store = recorder.store
    launch = store.launch
    records = store.trials()
    # Own runs only: ``mar status`` compares the count with this study's runs.
    finished = {
        record.key
        for record in records
        if record.experiment == recorder.study.name and record.status == "FINISHED"
    }
    recorder.expect(trials, len(finished))
    source_trial, known = shared_trainings(trials, records)
    to_train = [
        trial for trial in trials if trial.key not in source_trial and trial.key not in known
    ]
    # All trainings come before all tests: a test needs the result of its training.
    for trials_at_once in rounds(to_train):
        if not launch.stop_file.exists() and not recorder.is_over():
            _run(recorder, trials_at_once, {})
    trained: dict[str, Path] = {key: store.result_of(record) for key, record in known.items()}
    # A result may be on this disk alone, and a node that does not share it is to test it.
    if launch.worker.object_store:
        _upload_results(open_object_store(launch.worker.object_store), {*trained.values()})
    for key, source in source_trial.items():
        if source in recorder.done:
            trained[key] = launch.trial_folder(source) / RESULT_DIR
        # Without a result and without a failure the training was stopped: the next launch tests.
        elif source in recorder.failures:
            message = f"its training failed: {recorder.trials[source].name}"
            recorder.failed(key, FailureReason(message, recorder.failures[source].kind))
    to_test = [trial for trial in trials if trial.key in trained]
    for trial in to_test:
        trained_by = source_trial.get(trial.key) or known[trial.key].key
        recorder.tested(trial.key, trained_by)
    if to_test and not launch.stop_file.exists() and not recorder.is_over():
        _run(recorder, to_test, trained)


def rounds(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Divide trials into rounds, such that each finds what it continues.

    Trainings that differ in their length alone, under ``warmup_stable_decay``, follow each other
    from the shortest stable part on: each continues the one before it. All others are in the first
    round.
    """
    families: dict[str, list[Trial]] = {}
    divided: list[list[Trial]] = [[]]
    for trial in trials:
        shared = stable_identity(trial.identity)
        if shared is None:
            divided[0].append(trial)
        else:
            families.setdefault(shared, []).append(trial)
    for family in families.values():
        family.sort(key=lambda trial: stable_epochs(trial.settings.recipe))
        for number, trial in enumerate(family):
            if number == len(divided):
                divided.append([])
            divided[number].append(trial)
    # Within a round the study's order.
    order = {trial.key: number for number, trial in enumerate(trials)}
    return [sorted(each, key=lambda trial: order[trial.key]) for each in divided if each]


def _upload_results(store: ObjectStore, results: set[Path]) -> None:
    """Upload the results that are to be tested, so that every node finds them."""
    for result in results:
        name = f"trials/{result.parent.name}/{result.name}"
        # The manifest is uploaded last, so a result that has one is complete.
        if not store.exists(f"{name}/{MANIFEST}"):
            store.upload_dir(result, name)


def shared_trainings(
    trials: Sequence[Trial], records: Sequence[RunRecord]
) -> tuple[dict[str, str], dict[str, RunRecord]]:
    """Map each trial that need not be trained to the one whose trained model it reuses.

    Of trials that differ in ``evaluation`` alone, the one nearest to the defaults is trained.

    Returns:
        The trials that reuse another trial of the list: key -> that trial's key; and those that
        reuse a finished run: key -> the run.
    """
    known = match_training(trials, records)
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.key not in known:
            groups.setdefault(trial.training, []).append(trial)
    source_trial: dict[str, str] = {}
    for group in groups.values():
        source = min(group, key=_distance_from_defaults)
        for trial in group:
            if trial.key != source.key:
                source_trial[trial.key] = source.key
    return source_trial, known


def _distance_from_defaults(trial: Trial) -> int:
    """Return how many settings of the testing mask differ from the defaults.

    The identity is compared, in which settings that have no effect are at their defaults.
    """
    mask = json.loads(trial.identity)["evaluation"]["mask"]
    defaults = EvaluationMaskConfig().model_dump()
    return sum(mask[name] != default for name, default in defaults.items())


def _run(recorder: RunRecorder, trials: Sequence[Trial], trained: TrainedResults) -> None:
    """Run the trials on the launch's backend."""
    launch = recorder.store.launch
    backend_of(launch).run(trials, launch, recorder, trained)
