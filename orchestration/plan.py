"""What a study will cost, before it runs: which trials are there, which are new, how much each computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mar.annotations import read_split
from mar.cost import cost
from orchestration.results import Record, match
from orchestration.study import ABSENT, Study, Trial


@dataclass(frozen=True)
class PlannedTrial:
    """One line of a plan."""

    trial: Trial
    state: Literal["have", "new", "same"]
    """``same``: an earlier line of this plan trains it."""
    gflops: float
    params_m: float
    train_tflops_per_clip: float
    num_clips: int | None
    """Clips seen in training; none while the data is not there."""
    device_hours: float | None
    """At the throughput of the newest finished trial that ran equal models; none: no such trial yet."""
    run_id: str | None


def plan_trials(study: Study, records: Sequence[Record]) -> list[PlannedTrial]:
    """Return a line for each trial in the study's order."""
    found = match(study.trials, records)
    rate = _measured_rate(study, found)
    num_training_videos = _num_training_videos(study)
    lines: list[PlannedTrial] = []
    seen: set[str] = set()
    for trial in study.trials:
        figures, recipe = cost(trial.settings), trial.settings.recipe
        clips = None
        if num_training_videos is not None:
            steps = num_training_videos // trial.settings.videos_per_batch
            clips = steps * recipe.batch_size * recipe.epochs
        hours = clips * figures.train_gflops / rate / 3600 if clips is not None and rate else None
        state = "have" if trial.key in found else "same" if trial.key in seen else "new"
        seen.add(trial.key)
        lines.append(
            PlannedTrial(
                trial,
                state,
                figures.gflops,
                figures.params_m,
                figures.train_gflops / 1e3,
                clips,
                hours,
                found[trial.key].run_id if trial.key in found else None,
            )
        )
    return lines


def plan_text(lines: Sequence[PlannedTrial]) -> str:
    """Return the plan as a table with a line of totals."""
    header = f"{'':<5}{'trial':<40}{'GFLOPs':>9}{'Param (M)':>11}{'clips':>12}{'device-hours':>14}"
    rows = [
        f"{line.state:<5}{line.trial.name:<40}{line.gflops:>9.4g}{line.params_m:>11.2f}"
        f"{_or_dash(line.num_clips, ','):>12}{_or_dash(line.device_hours, '.2f'):>14}"
        for line in lines
    ]
    new = [line for line in lines if line.state == "new"]
    words = f"{len(lines)} trials: {sum(line.state == 'have' for line in lines)} finished, {len(new)} to train"
    hours = [line.device_hours for line in new if line.device_hours is not None]
    if len(hours) == len(new) and new:
        words += f", about {sum(hours):.2f} device-hours at the throughput of this study's finished trials"
    elif new:
        words += "; device-hours are known once a trial of this study is finished here"
    if any(line.trial.fingerprint == ABSENT for line in lines):
        words += f"\nthe data is not there yet: {lines[0].trial.settings.data.root}"
    absent = {line.trial.settings.encoder.weights for line in lines if line.trial.lacks_weights} - {None}
    words += "".join(f"\nthe weights are not here yet: {name}" for name in sorted(map(str, absent)))
    return "\n".join([header, *rows, words])


def plan_json(lines: Sequence[PlannedTrial]) -> str:
    """Return the plan for a program."""
    return json.dumps(
        [
            {
                "trial": line.trial.name,
                "labels": dict(line.trial.labels),
                "seed": line.trial.settings.seed,
                "key": line.trial.key,
                "state": line.state,
                "gflops": line.gflops,
                "params_m": line.params_m,
                "num_clips": line.num_clips,
                "device_hours": line.device_hours,
                "run_id": line.run_id,
            }
            for line in lines
        ],
        indent=1,
        ensure_ascii=False,
    )


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _num_training_videos(study: Study) -> int | None:
    """Return the size of the training split; none while the data is not there, or where trials differ in it."""
    data = study.trials[0].settings.data
    if any(trial.fingerprint == ABSENT or trial.settings.data != data for trial in study.trials):
        return None
    return len(read_split(data, "train"))


def _measured_rate(study: Study, found: dict[str, Record]) -> float | None:
    """Return the training GFLOPs a second that finished trials of this study reached, their mean; none without one."""
    rates = [
        found[trial.key].metrics["throughput/clips_per_s"] * cost(trial.settings).train_gflops
        for trial in study.trials
        if trial.key in found and "throughput/clips_per_s" in found[trial.key].metrics
    ]
    return sum(rates) / len(rates) if rates else None
