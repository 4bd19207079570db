"""``mar status`` and ``mar stop``: show and stop the studies of a store.

They work in any terminal, and on any machine that sees the store.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from mar.errors import UserError
from mar.safe_input import read_json
from orchestration.config import LaunchConfig
from orchestration.execution.lock import request_stop
from orchestration.storage.object_store import open_object_store
from orchestration.storage.trial_dir import TrialDir
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store

_LOST_S = 120.0
"""Seconds; a trial whose heartbeat is older is not taken for one that runs."""
_SHOW_SILENCE_S = 30.0
"""Seconds; an older heartbeat is mentioned. A worker writes one every two seconds."""


@dataclass(frozen=True)
class RunningTrial:
    """A trial that trains or tests."""

    name: str
    step: int | None
    """None if it has written no heartbeat yet."""
    steps: int | None
    steps_per_s: float | None
    left_s: float | None
    """Seconds to the end of its training, at the present rate."""
    clips_per_s: float | None
    workers: int | None
    device: str
    host: str
    silent_s: float | None
    """Seconds since its last heartbeat."""


@dataclass(frozen=True)
class StudyStatus:
    """One study of the store."""

    study: str
    launch: str
    """Which process runs it, and since when; empty if none does."""
    is_stopping: bool
    counts: dict[str, int]
    """Trials by the status of their runs in MLflow."""
    running: list[RunningTrial]
    queued: int
    """Trials of this launch that have not started."""
    left_s: float | None
    """Seconds to the end of the study, if the queued trials are like the running ones."""


def status(launch: LaunchConfig) -> list[StudyStatus]:
    """Return every study of the store, those that run and those that ran, sorted by name.

    Raises:
        Failure: the tracking store cannot be used.
    """
    store = Store(launch)
    records = store.trials()
    expected = store.expected()
    # A study that has just started has its lock, but no run in MLflow yet.
    names = sorted({record.experiment for record in records} | _locked(launch))
    return [_study_status(name, records, launch, expected.get(name, 0)) for name in names]


def stop(launch: LaunchConfig) -> None:
    """Ask a study's workers to save and stop; its launch then ends.

    Raises:
        UserError: the study does not run.
    """
    is_running = bool(_holder(launch))
    # With an object store the lock may be on the disk of another machine: MLflow's runs decide.
    if not is_running and launch.worker.object_store:
        records = Store(launch).trials()
        is_running = any(
            record.experiment == launch.study and record.status == "RUNNING" for record in records
        )
    if not is_running:
        raise UserError(f"the study {launch.study} is not being run from the store {launch.store}")
    request_stop(launch)


def _locked(launch: LaunchConfig) -> set[str]:
    """Return the studies whose lock is held."""
    names = {file.stem for file in (launch.store.resolve() / "locks").glob("*.lock")}
    return {name for name in names if _holder(replace(launch, study=name))}


def _holder(launch: LaunchConfig) -> str:
    """Return which process holds the study's lock; an empty text if none does."""
    folder = launch.store.resolve() / "locks"
    file = folder / f"{launch.study}.lock"
    if not file.is_file():
        return ""
    # A lock that can be taken is held by nobody. It is released at once; a launch that starts just
    # now waits for that (``study_lock``).
    try:
        filelock.FileLock(file).acquire(timeout=0).lock.release()
    except filelock.Timeout:
        # Its holder writes the file just after it has taken the lock.
        with suppress(OSError):
            return (folder / f"{launch.study}.txt").read_text(encoding="utf-8")
        return "unknown process"
    return ""


def _study_status(
    name: str, records: Sequence[RunRecord], launch: LaunchConfig, expected: int
) -> StudyStatus:
    own = [record for record in records if record.experiment == name]
    study_launch = replace(launch, study=name)
    holder = _holder(study_launch)
    # With an object store the launch may be on another machine, whose lock is not seen here: then a
    # fresh heartbeat shows that the study runs.
    running = [_running_trial(record, launch) for record in own if record.status == "RUNNING"]
    is_running = bool(holder) or (
        launch.worker.object_store is not None and any(_is_alive(each) for each in running)
    )
    counts = dict(Counter(record.status.lower() for record in own))
    # Only a running study has queued trials: the tag ``EXPECTED`` stays when a launch ends.
    queued = 0
    if is_running:
        num_over = counts.get("finished", 0) + counts.get("failed", 0)
        queued = max(expected - num_over - len(running), 0)
    else:
        running = []
        # These runs are RUNNING because their launch was killed before it could mark them.
        if counts.get("running"):
            counts["lost"] = counts.pop("running")
    return StudyStatus(
        study=name,
        launch=holder,
        is_stopping=study_launch.stop_file.exists(),
        counts=counts,
        running=running,
        queued=queued,
        left_s=_left_s(running, queued),
    )


def _is_alive(trial: RunningTrial) -> bool:
    return trial.silent_s is not None and trial.silent_s < _LOST_S


def _left_s(running: Sequence[RunningTrial], queued: int) -> float | None:
    """Return the seconds that all remaining steps take at the present rate of all running trials.

    Returns none while no rate is known.
    """
    rate = 0.0
    steps_left = 0
    num_known = 0
    steps_of_a_trial = 0
    for trial in running:
        # A trial that starts, or tests, has no rate yet.
        if trial.steps is None or trial.step is None or not trial.steps_per_s:
            continue
        if not num_known:
            steps_of_a_trial = trial.steps
        num_known += 1
        rate += trial.steps_per_s
        steps_left += trial.steps - trial.step
    if not num_known:
        return None
    # A trial whose steps are not known is counted with as many as the first known one has.
    num_unknown = queued + len(running) - num_known
    return (steps_left + num_unknown * steps_of_a_trial) / rate


def _running_trial(record: RunRecord, launch: LaunchConfig) -> RunningTrial:
    """Return how far a trial is, from its heartbeat."""
    heartbeat: dict[str, Any] = {}
    file = TrialDir(launch.trial_folder(record.key)).heartbeat
    object_store = launch.worker.object_store
    # The worker may be on a node that does not share this disk.
    if object_store:
        open_object_store(object_store).download(f"trials/{record.key}/{file.name}", file)
    # Without a readable file every field stays unknown.
    with suppress(OSError, ValueError):
        heartbeat = read_json(file)
    step = heartbeat.get("step")
    steps = heartbeat.get("steps")
    rate = heartbeat.get("steps_per_s")
    left_s = None
    if rate and step is not None and steps is not None:
        left_s = (steps - step) / rate
    silent_s = None
    if "time" in heartbeat:
        silent_s = time.time() - heartbeat["time"]
    return RunningTrial(
        name=record.tags.get("mlflow.runName", record.key),
        step=step,
        steps=steps,
        steps_per_s=rate,
        left_s=left_s,
        clips_per_s=heartbeat.get("clips_per_s"),
        workers=heartbeat.get("workers"),
        device=str(heartbeat.get("device", "")),
        host=str(heartbeat.get("host", "")),
        silent_s=silent_s,
    )


def status_text(found: Sequence[StudyStatus], store: Path) -> str:
    """Return one line for each study, and below it one for each of its running trials."""
    lines: list[str] = []
    for study in found:
        lines.append(_study_line(study))
        lines += [_trial_line(trial) for trial in study.running]
    if not lines:
        return f"no study in {store} yet"
    return "\n".join(lines)


def _study_line(study: StudyStatus) -> str:
    counts = ", ".join(f"{count} {word}" for word, count in sorted(study.counts.items()))
    state = "not running"
    if study.launch and study.is_stopping:
        state = f"stopping: {study.launch}"
    elif study.launch:
        state = f"running: {study.launch}"
    if study.queued:
        state += f", {study.queued} queued"
    return f"{study.study:<34} {counts or 'no trial yet':<40} {state}{_left_text(study.left_s)}"


def _trial_line(trial: RunningTrial) -> str:
    parts = [f"  {trial.name}: between steps"]
    if trial.step is not None:
        parts = [f"  {trial.name}: step {trial.step}/{trial.steps}"]
    if trial.clips_per_s:
        parts.append(f", {trial.steps_per_s:.2f} steps/s, {trial.clips_per_s:.1f} clips/s")
    parts.append(_left_text(trial.left_s))
    if trial.host:
        workers = ""
        if trial.workers and trial.workers > 1:
            workers = f"{trial.workers} workers, "
        parts.append(f" ({workers}{trial.device} on {trial.host})")
    if trial.silent_s and trial.silent_s > _SHOW_SILENCE_S:
        parts.append(f", silent for {trial.silent_s:.0f} s")
    return "".join(parts)


def _left_text(left_s: float | None) -> str:
    if left_s is None:
        return ""
    return f", about {left_s / 60:.1f} min left"
