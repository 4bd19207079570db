"""Which trials of a study are to be trained, which only tested, and in which order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mar import MANIFEST, RESULT_DIR
from mar.config.schema import EvaluationMaskConfig
from orchestration.execution.recorder import RunRecorder
from orchestration.failures import FailureReason
from orchestration.storage.object_store import ObjectStore, remote
from orchestration.studies.matching import match, match_training
from orchestration.studies.trial import Study, Trial
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store


def missing_trials(study: Study, store: Store) -> list[Trial]:
    """Return the trials that no finished run of any study has, each training once, in order."""
    if not study.trains:
        return []
    found = match(study.to_run, store.trials())
    return list({trial.key: trial for trial in study.to_run if trial.key not in found}.values())


def train_missing(recorder: RunRecorder, trials: Sequence[Trial]) -> None:
    """Train the trials, then test those whose training is another's; failures are in ``launched.failures``.

    Raises:
        UserError: one trial asks for more than the cluster has.
    """
    store = recorder.store
    records = store.trials()
    own = {
        record.key
        for record in records
        if record.experiment == recorder.study.name and record.status == "FINISHED"
    }
    recorder.expect(trials, len(own))
    source_trial, known = shared_trainings(trials, records)
    untrained = [
        trial
        for trial in trials
        if source_trial.get(trial.key, trial.key) == trial.key and trial.key not in known
    ]
    if untrained:
        _run(recorder, untrained, {})
    trained: dict[str, Path] = {key: store.result_of(record) for key, record in known.items()}
    if store.launch.remote:
        _push_results(remote(store.launch.remote), {*trained.values()})
    for key, source in source_trial.items():
        if source in recorder.done:
            trained[key] = store.launch.trial_folder(source) / RESULT_DIR
        elif source in recorder.failures:
            kind = recorder.failures[source].kind
            recorder.failed(
                key, FailureReason(f"its training failed: {recorder.trials[source].name}", kind)
            )
    tests = [trial for trial in trials if trial.key in trained]
    for trial in tests:
        recorder.tested(trial.key, source_trial.get(trial.key) or known[trial.key].key)
    if tests and not store.launch.stop_file.exists() and not recorder.is_over():
        _run(recorder, tests, trained)


def _push_results(store: ObjectStore, results: set[Path]) -> None:
    """Have the results that are to be tested again where every node finds them."""
    for result in results:
        name = f"trials/{result.parent.name}/{result.name}"
        if not store.exists(f"{name}/{MANIFEST}"):
            store.push_folder(result, name)


def shared_trainings(
    trials: Sequence[Trial], records: Sequence[RunRecord]
) -> tuple[dict[str, str], dict[str, RunRecord]]:
    """Return whose training each trial is that need not be trained: another of the trials, or a finished run.

    Of trials that differ in ``evaluation`` alone the one nearest to the defaults is trained.
    """
    known = match_training(trials, records)
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.key not in known:
            groups.setdefault(trial.training, []).append(trial)
    source_trial: dict[str, str] = {}
    for group in groups.values():
        first = min(group, key=distance_from_defaults)
        source_trial |= {trial.key: first.key for trial in group if trial is not first}
    return source_trial, known


def distance_from_defaults(trial: Trial) -> int:
    """Return how many settings of the mask of testing are not the defaults, as the identity has them."""
    mask = json.loads(trial.identity)["evaluation"]["mask"]
    return sum(
        mask[name] != default for name, default in EvaluationMaskConfig().model_dump().items()
    )


def _run(recorder: RunRecorder, trials: Sequence[Trial], trained: dict[str, Path]) -> None:
    launch = recorder.store.launch
    if launch.backend == "local":
        from orchestration.backends import local  # torch, which the other backends load elsewhere

        local.run(trials, launch, recorder, trained)
    else:
        from orchestration.backends import ray_tune

        ray_tune.run(trials, launch, recorder, trained)
