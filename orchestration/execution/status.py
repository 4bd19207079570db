"""``mar status`` and ``mar stop``: what runs in a store, from any terminal or machine that sees it."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from mar.errors import UserError
from mar.safe_input import read_json
from orchestration.config import LaunchConfig
from orchestration.execution.lock import request_stop
from orchestration.storage.object_store import remote
from orchestration.storage.trial_dir import HEARTBEAT
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.store import Store

_LOST_S = 120.0
"""A trial whose pulse is older is not taken for one that runs elsewhere."""


@dataclass(frozen=True)
class RunningTrial:
    """A trial under way."""

    name: str
    step: int | None
    """None: it has told of none yet."""
    steps: int | None
    steps_per_s: float | None
    left_s: float | None
    clips_per_s: float | None
    workers: int | None
    device: str
    host: str
    silent_s: float | None
    """Since its worker last told of itself."""


@dataclass(frozen=True)
class StudyStatus:
    """One study of the store."""

    study: str
    launch: str
    """Which process runs it, since when; empty: none does."""
    is_stopping: bool
    counts: dict[str, int]
    """Trials by MLflow's word for their state."""
    running: list[RunningTrial]
    queued: int
    """Trials of this launch that have not begun."""
    left_s: float | None
    """To the end of the study, if the queued trials are as those that run."""


def status(launch: LaunchConfig) -> list[StudyStatus]:
    """Return every study that runs, and those that ran, by name.

    Raises:
        Failure: the tracking store cannot be used.
    """
    store = Store(launch)
    records, expected = store.trials(), store.expected()
    names = sorted({record.experiment for record in records} | _locked(launch))
    return [_study(name, records, launch, expected.get(name, 0)) for name in names]


def stop(launch: LaunchConfig) -> None:
    """Ask a study's workers to save and stop; its driver then ends.

    Raises:
        UserError: nobody runs it.
    """
    is_running = bool(_holder(launch)) or (
        launch.remote  # its lock may be on another machine
        and any(
            each.experiment == launch.study and each.status == "RUNNING"
            for each in Store(launch).trials()
        )
    )
    if not is_running:
        raise UserError(f"the study {launch.study} is not being run from the store {launch.store}")
    request_stop(launch)


def _locked(launch: LaunchConfig) -> set[str]:
    names = {file.stem for file in (launch.store.resolve() / "locks").glob("*.lock")}
    return {name for name in names if _holder(launch.model_copy(update={"study": name}))}


def _holder(launch: LaunchConfig) -> str:
    """Return which process holds the study's lock; empty: none."""
    folder = launch.store.resolve() / "locks"
    file = folder / f"{launch.study}.lock"
    if not file.is_file():
        return ""
    try:
        filelock.FileLock(file).acquire(timeout=0).lock.release()
    except filelock.Timeout:
        with suppress(OSError):
            return (folder / f"{launch.study}.txt").read_text(encoding="utf-8")
        return "unknown process"
    return ""


def _study(name: str, records: list[RunRecord], launch: LaunchConfig, expected: int) -> StudyStatus:
    own = [record for record in records if record.experiment == name]
    there = launch.model_copy(update={"study": name})
    holder = _holder(there)
    running = [_trial(record, launch) for record in own if record.status == "RUNNING"]
    has_pulse = any(each.silent_s is not None and each.silent_s < _LOST_S for each in running)
    is_running = bool(holder or (launch.remote and has_pulse))
    running = running if is_running else []
    counts = dict(Counter(record.status.lower() for record in own))
    if not is_running and counts.get("running"):  # its driver is no more
        counts["lost"] = counts.pop("running")
    pruned = sum(counts.get(state, 0) for state in ("finished", "failed"))
    queued = max(expected - pruned - len(running), 0) if is_running else 0
    return StudyStatus(
        name, holder, there.stop_file.exists(), counts, running, queued, _left_s(running, queued)
    )


def _left_s(running: list[RunningTrial], queued: int) -> float | None:
    """Return the seconds that all steps left take at the rate of now."""
    known = [
        each
        for each in running
        if each.steps is not None and each.step is not None and each.steps_per_s
    ]
    if not known:
        return None
    rate = sum(each.steps_per_s or 0.0 for each in known)
    left = sum((each.steps or 0) - (each.step or 0) for each in known)
    return (left + (queued + len(running) - len(known)) * (known[0].steps or 0)) / rate


def _trial(record: RunRecord, launch: LaunchConfig) -> RunningTrial:
    pulse: dict[str, Any] = {}
    file = launch.trial_folder(record.key) / HEARTBEAT
    if launch.remote:
        remote(launch.remote).pull(f"trials/{record.key}/{HEARTBEAT}", file)
    with suppress(OSError, ValueError):
        pulse = read_json(file)
    step, steps, rate = pulse.get("step"), pulse.get("steps"), pulse.get("steps_per_s")
    return RunningTrial(
        name=record.tags.get("mlflow.runName", record.key),
        step=step,
        steps=steps,
        steps_per_s=rate,
        left_s=(steps - step) / rate if rate and step is not None and steps is not None else None,
        clips_per_s=pulse.get("clips_per_s"),
        workers=pulse.get("workers"),
        device=str(pulse.get("device", "")),
        host=str(pulse.get("host", "")),
        silent_s=time.time() - pulse["time"] if "time" in pulse else None,
    )


def status_text(found: list[StudyStatus], store: Path) -> str:
    """Return the studies as lines."""
    lines: list[str] = []
    for each in found:
        counts = ", ".join(f"{count} {word}" for word, count in sorted(each.counts.items()))
        state = (
            f"{'stopping' if each.is_stopping else 'running'}: {each.launch}"
            if each.launch
            else "not running"
        )
        waiting = f", {each.queued} queued" if each.queued else ""
        left = f", about {each.left_s / 60:.1f} min left" if each.left_s is not None else ""
        lines.append(f"{each.study:<34} {counts or 'no trial yet':<40} {state}{waiting}{left}")
        for trial in each.running:
            steps = (
                f"step {trial.step}/{trial.steps}" if trial.step is not None else "between steps"
            )
            rate = (
                f", {trial.steps_per_s:.2f} steps/s, {trial.clips_per_s:.1f} clips/s"
                if trial.clips_per_s
                else ""
            )
            left = f", about {trial.left_s / 60:.1f} min left" if trial.left_s is not None else ""
            silent = (
                f", silent for {trial.silent_s:.0f} s"
                if trial.silent_s and trial.silent_s > 30
                else ""
            )
            workers = f"{trial.workers} workers, " if (trial.workers or 0) > 1 else ""
            host = f" ({workers}{trial.device} on {trial.host})" if trial.host else ""
            lines.append(f"  {trial.name}: {steps}{rate}{left}{host}{silent}")
    return "\n".join(lines) if lines else f"no study in {store} yet"
