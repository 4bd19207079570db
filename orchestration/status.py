"""``mar status`` and ``mar stop``: what runs in a store, from any terminal or machine that sees it."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from mar.errors import UserError
from orchestration.config import LaunchConfig
from orchestration.tracking import RunRecord, Store
from orchestration.trial import PULSE


@dataclass(frozen=True)
class RunningTrial:
    """A trial under way."""

    name: str
    step: int | None
    """None: it has told of none yet."""
    steps: int | None
    steps_per_s: float | None
    left_s: float | None
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


def status(launch: LaunchConfig) -> list[StudyStatus]:
    """Return every study that runs, and those that ran, by name.

    Raises:
        Failure: the tracking store cannot be used.
    """
    records = Store(launch).trials()
    return [
        _study(name, records, launch) for name in sorted({record.experiment for record in records} | _locked(launch))
    ]


def stop(launch: LaunchConfig) -> None:
    """Ask a study's workers to save and stop; its driver then ends.

    Raises:
        UserError: nobody runs it.
    """
    if not _holder(launch):
        raise UserError(f"the study {launch.study} is not being run from the store {launch.store}")
    launch.stop_file.touch()


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


def _study(name: str, records: list[RunRecord], launch: LaunchConfig) -> StudyStatus:
    own = [record for record in records if record.experiment == name]
    there = launch.model_copy(update={"study": name})
    holder = _holder(there)
    running = [_trial(record, launch) for record in own if record.status == "RUNNING"] if holder else []
    counts = dict(Counter(record.status.lower() for record in own))
    if not holder and counts.get("running"):  # its driver is no more
        counts["lost"] = counts.pop("running")
    return StudyStatus(name, holder, there.stop_file.exists(), counts, running)


def _trial(record: RunRecord, launch: LaunchConfig) -> RunningTrial:
    pulse: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        pulse = json.loads((launch.trial_folder(record.key) / PULSE).read_text(encoding="utf-8"))
    step, steps, rate = pulse.get("step"), pulse.get("steps"), pulse.get("steps_per_s")
    left_s = (steps - step) / rate if rate and step is not None and steps is not None else None
    silent_s = time.time() - pulse["time"] if "time" in pulse else None
    name = record.tags.get("mlflow.runName", record.key)
    return RunningTrial(name, step, steps, rate, left_s, str(pulse.get("host", "")), silent_s)


def status_text(found: list[StudyStatus], store: Path) -> str:
    """Return the studies as lines."""
    lines: list[str] = []
    for each in found:
        counts = ", ".join(f"{count} {word}" for word, count in sorted(each.counts.items()))
        state = f"{'stopping' if each.is_stopping else 'running'}: {each.launch}" if each.launch else "not running"
        lines.append(f"{each.study:<34} {counts or 'no trial yet':<40} {state}")
        for trial in each.running:
            steps = f"step {trial.step}/{trial.steps}" if trial.step is not None else "between steps"
            rate = f", {trial.steps_per_s:.2f} steps/s" if trial.steps_per_s else ""
            left = f", about {trial.left_s / 60:.1f} min left" if trial.left_s is not None else ""
            silent = f", silent for {trial.silent_s:.0f} s" if trial.silent_s and trial.silent_s > 30 else ""
            host = f" on {trial.host}" if trial.host else ""
            lines.append(f"  {trial.name}: {steps}{rate}{left}{host}{silent}")
    return "\n".join(lines) if lines else f"no study in {store} yet"
