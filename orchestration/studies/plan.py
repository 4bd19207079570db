"""The plan of a study before it runs: which trials are finished, which are new, what each costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mar.config.schedule import stable_epochs
from mar.data.annotations import read_split
from mar.errors import UserError
from mar.model.flops import classifier_gflops, cost
from orchestration.studies.devices import Device, planning_figures
from orchestration.studies.diff import Neighbours
from orchestration.studies.identity import settings_of_identity, stable_identity
from orchestration.studies.matching import AnyRecord, Record, match, match_training
from orchestration.studies.trial import ABSENT, Study, Trial

_BYTES_PER_PARAMETER = 4
"""Of the model in a result, in float32. A finished trial's checkpoints are removed."""
# The default ``RetentionPolicy`` keeps two checkpoints of a running trial. Each has the weights and
# AdamW's two moments.
_CHECKPOINTS = 2 * 3
"""Space of a running trial's checkpoints, as a multiple of its model's."""
_RUNS_FOR_A_RATE = 30
"""Finished runs of a store whose throughput is averaged."""


@dataclass(frozen=True)
class PlannedTrial:
    """One line of a plan."""

    study: str
    trial: Trial
    state: Literal["have", "new", "test", "same"]
    """``have``: finished. ``new``: to train. ``test``: only to test, with the model of a finished
    run or of an earlier line. ``same``: an earlier line is the same trial."""
    of: str
    """The run or the earlier line that it equals, or whose model it is tested with."""
    gflops: float
    params_m: float
    train_tflops_per_clip: float
    num_clips: int | None
    """Clips seen in training; none if the size of the training split is unknown."""
    device_hours: float | None
    """Of its training and its tests, at the device's throughput; without a device at the mean of
    the study's finished trials, or else of those of earlier studies, or of other runs of the
    store; none if none is known."""
    storage_gib: float
    run_id: str | None


@dataclass
class Planned:
    """What earlier lines of a plan train and test."""

    trials: dict[str, str] = field(default_factory=dict[str, str])
    """Trial key -> name of the line."""
    trainings: dict[str, str] = field(default_factory=dict[str, str])
    """Training's identity -> name of the first line with it."""
    rates: list[float] = field(default_factory=list[float])
    """Training GFLOPs a second of each finished trial."""
    stable: dict[str, set[int]] = field(default_factory=dict[str, set[int]])
    """Trainings that can be prolonged, without their length -> the lengths of the stable parts
    that there are."""


def plan_trials(
    study: Study,
    records: Sequence[AnyRecord],
    device: Device | None = None,
    earlier: Planned | None = None,
    continues_planned: bool = True,
) -> list[PlannedTrial]:
    """Return a line for each trial in the study's order.

    ``earlier`` has the lines of studies that run before this one; the lines of this one are added
    to it. With ``continues_planned`` a training continues shorter ones of the plan, and else
    finished ones alone.
    """
    earlier = earlier if earlier is not None else Planned()
    # A figure of masks is drawn from the settings: its rows train nothing.
    trials = study.trials if study.trains else []
    found = match(trials, records)
    trained = match_training(trials, records)
    _add_stable_parts(earlier, trials, records)
    rates = _measured_rates(study, found)
    earlier.rates += rates
    # GFLOPs a second depend on the model's size and the mask's ratio: the study's own trials are
    # the nearest, those of earlier studies better than nothing.
    if device:
        rate = device.train_gflops_per_s
    else:
        rate = _mean(rates or earlier.rates or _rates_of_store(records))
    sizes: dict[str, int | None] = {}
    lines: list[PlannedTrial] = []
    for trial in trials:
        figures = cost(trial.settings)
        name = f"{study.name}: {trial.name}"
        shorter = trials if continues_planned else []
        clips = _num_clips(trial, sizes, continued_epochs(trial, shorter, earlier))
        # The first line with a training pays for it: later lines find it in ``earlier``.
        state, of = _state(trial, found, trained, earlier)
        hours = None
        if clips is not None and rate:
            is_trained = state != "test"
            gflops = _tested_views(trial, is_trained) * _gflops_of_view(trial)
            if is_trained:
                gflops += clips * figures.train_gflops
            hours = gflops / rate / 3600
        earlier.trials.setdefault(trial.key, name)
        # A finished run without its model leaves later lines nothing to test with.
        if trial.key not in found or found[trial.key].has_model:
            earlier.trainings.setdefault(trial.training, name)
        storage_gib = figures.train_params_m * 1e6 * _BYTES_PER_PARAMETER / 2**30
        if trial.key in found:
            run_id = found[trial.key].run_id
        else:
            run_id = None
        costs = (figures.gflops, figures.params_m, figures.train_gflops / 1e3)
        lines.append(
            PlannedTrial(study.name, trial, state, of, *costs, clips, hours, storage_gib, run_id)
        )
    return lines


def _state(
    trial: Trial, found: dict[str, AnyRecord], trained: dict[str, AnyRecord], earlier: Planned
) -> tuple[Literal["have", "new", "test", "same"], str]:
    """Return a line's state, and the run or earlier line that it needs."""
    # The cheapest first: nothing to do, then a test of another's model, then a training.
    if trial.key in found:
        return "have", found[trial.key].run_id
    if trial.key in earlier.trials:
        return "same", earlier.trials[trial.key]
    if trial.key in trained:
        return "test", trained[trial.key].run_id
    if trial.training in earlier.trainings:
        return "test", earlier.trainings[trial.training]
    return "new", ""


def plan_text(
    lines: Sequence[PlannedTrial],
    device: Device | None = None,
    neighbours: Neighbours | None = None,
) -> str:
    """Return the plan as a table, by study, with a line of totals.

    With ``neighbours``, each new trial is followed by its differences from the nearest run.
    """
    width = max([len(line.trial.name) for line in lines], default=0) + 2
    header = (
        f"{'':<5}{'trial':<{width}}{'GFLOPs':>9}{'Param (M)':>11}{'clips':>12}{'device-hours':>14}"
    )
    text = [header]
    studies = list(dict.fromkeys(line.study for line in lines))
    for study in studies:
        text += [study] if len(studies) > 1 else []
        for line in (line for line in lines if line.study == study):
            runs = line.state == "new"
            if line.state == "same":
                of = f"  = {line.of}"
            elif line.state == "test":
                of = f"  model of {line.of}"
            else:
                of = ""
            # Only a training has clips and hours: a column's sum is what the study still costs.
            text.append(
                f"{line.state:<5}{line.trial.name:<{width}}"
                f"{line.gflops:>9.4g}{line.params_m:>11.2f}"
                f"{_or_dash(line.num_clips if runs else None, ','):>12}"
                f"{_hours_text(line.device_hours if runs else None):>14}{of}"
            )
            text += _explained(line, neighbours) if neighbours and runs else []
    return "\n".join([*text, *_totals(lines, device)])


def _explained(line: PlannedTrial, neighbours: Neighbours) -> list[str]:
    """Return lines that say how a new trial differs from the run nearest to it."""
    near = neighbours.nearest(line.trial)
    if near is None:
        return ["       nothing is trained yet"]
    run_id, found = near
    return [
        f"       unlike run {run_id}:",
        *(f"         {each.setting}: {each.first} → {each.second}" for each in found),
    ]


def _totals(lines: Sequence[PlannedTrial], device: Device | None) -> list[str]:
    """Return the line of totals, then a line for the storage and for each thing that is missing."""
    counts = {
        state: sum(line.state == state for line in lines)
        for state in ("have", "new", "test", "same")
    }
    new = [line for line in lines if line.state == "new"]
    to_run = [line for line in lines if line.state in ("new", "test")]
    summary = f"{len(lines)} trials: {counts['have']} finished, {counts['new']} to train"
    summary += f", {counts['test']} to test only" if counts["test"] else ""
    summary += f", {counts['same']} the same as another" if counts["same"] else ""
    hours = [line.device_hours for line in to_run if line.device_hours is not None]
    # A sum over some of the trials would look like the cost of all of them.
    if to_run and len(hours) == len(to_run):
        if device:
            where = f"on {device.name} ({device.source})"
        else:
            where = "at the throughput of finished trials"
        summary += f", about {_hours_text(sum(hours))} device-hours {where}"
        if device and device.price_per_h:
            summary += f", {sum(hours) * device.price_per_h:,.0f} in money"
    elif new:
        summary += "; device-hours are known after a trial has finished, or with --device"
    notes = [summary]
    if new:
        notes.append(
            f"storage about {sum(line.storage_gib for line in new):.1f} GiB for their models, and "
            "for each running trial "
            f"{_CHECKPOINTS * max(line.storage_gib for line in new):.1f} GiB at most for its "
            "checkpoints"
        )
    # A dictionary keeps the order of the trials, which a set does not.
    absent = {
        line.trial.settings.data.root: None for line in lines if line.trial.fingerprint == ABSENT
    }
    notes += [f"the data is not here yet: {root}" for root in absent]
    weights = {
        line.trial.settings.encoder.weights for line in lines if line.trial.lacks_weights
    } - {None}
    return notes + [f"the weights are not here yet: {name}" for name in sorted(map(str, weights))]


def plan_json(lines: Sequence[PlannedTrial], neighbours: Neighbours | None = None) -> str:
    """Return the plan as JSON, for programs."""

    def unlike(line: PlannedTrial) -> dict[str, object]:
        # The key is left out where a trial has no neighbour, so ``unlike`` is never null.
        if neighbours and line.state == "new":
            near = neighbours.nearest(line.trial)
        else:
            near = None
        if near is None:
            return {}
        return {
            "unlike": {
                "run_id": near[0],
                "settings": {each.setting: [each.first, each.second] for each in near[1]},
            }
        }

    return json.dumps(
        [
            {
                "study": line.study,
                "trial": line.trial.name,
                "labels": dict(line.trial.labels),
                "seed": line.trial.settings.seed,
                "key": line.trial.key,
                "state": line.state,
                "of": line.of,
                "gflops": line.gflops,
                "params_m": line.params_m,
                "num_clips": line.num_clips,
                "device_hours": line.device_hours,
                "storage_gib": line.storage_gib,
                "run_id": line.run_id,
                **unlike(line),
            }
            for line in lines
        ],
        indent=1,
        ensure_ascii=False,
    )


def _or_dash(value: float | None, form: str) -> str:
    """Return a formatted number, or a dash for none."""
    return "–" if value is None else format(value, form)


def _hours_text(hours: float | None) -> str:
    """Return hours with two decimals, or with two digits where they would round to nothing."""
    if hours is not None and 0 < hours < 0.1:
        return f"{hours:.2g}"
    return _or_dash(hours, ".2f")


def _add_stable_parts(earlier: Planned, trials: Sequence[Trial], records: Sequence[Record]) -> None:
    """Add the stable parts of finished trainings, where a trial of the study may continue one."""
    if not any(stable_identity(trial.identity) for trial in trials):
        return
    for record in records:
        try:
            shared = stable_identity(record.identity)
            if shared and record.status == "FINISHED":
                recipe = settings_of_identity(record.identity).recipe
                earlier.stable.setdefault(shared, set()).add(stable_epochs(recipe))
        # A run of an earlier version may have settings that do not exist today.
        except (ValueError, KeyError, UserError):
            continue


def continued_epochs(trial: Trial, trials: Sequence[Trial], earlier: Planned) -> int:
    """Return how many epochs of a training are trained before it, as part of a shorter one.

    Those of finished runs, and of ``trials`` if all of them are trained: the shorter before the
    longer, and equally long ones in their order (``execution.scheduling.rounds``).
    """
    shared = stable_identity(trial.identity)
    if shared is None:
        return 0
    own = stable_epochs(trial.settings.recipe)
    lengths = {0, *(each for each in earlier.stable.get(shared, set()) if each <= own)}
    is_before = True
    for other in trials:
        if other.key == trial.key:
            is_before = False
        elif stable_identity(other.identity) == shared:
            length = stable_epochs(other.settings.recipe)
            if length < own or (length == own and is_before):
                lengths.add(length)
    return max(lengths)


def _num_clips(trial: Trial, sizes: dict[str, int | None], continued: int) -> int | None:
    """Return how many clips a training sees; none if the number of its videos is unknown.

    ``sizes`` is what ``_num_training_videos`` keeps; ``continued`` the epochs that it need not
    train.
    """
    size = _num_training_videos(trial, sizes)
    if size is None:
        return None
    # The loader drops the last, incomplete batch of an epoch. A batch may have several clips of one
    # video (repeated augmentation), so steps count videos and the costs count clips.
    steps = size // trial.settings.videos_per_batch
    recipe = trial.settings.recipe
    return steps * recipe.batch_size * (recipe.epochs - continued)


def _num_training_videos(trial: Trial, known: dict[str, int | None]) -> int | None:
    """Return the number of training videos, of the official split while the data is missing.

    None: the data is missing and its format has no official split.
    """
    data = trial.settings.data
    # Most trials of a study share their data: its list of videos is read once.
    source = data.model_dump_json()
    if source not in known:
        official = planning_figures()["train_videos"].get(data.format, {})
        if trial.fingerprint == ABSENT and official.get("classes") == data.num_classes:
            known[source] = official["videos"]
        # Other videos in that format, as those of mini.
        elif trial.fingerprint == ABSENT:
            known[source] = None
        else:
            known[source] = len(read_split(data, "train"))
    return known[source]


def _gflops_of_view(trial: Trial) -> float:
    """Return the operations of one view in validation and test.

    Of cached tokens the classifier alone; the pass that computes them, once for all trials that
    share them, is not counted.
    """
    if trial.settings.encoder.cached:
        return classifier_gflops(trial.settings)
    return cost(trial.settings).gflops


def _tested_views(trial: Trial, is_trained: bool) -> int:
    """Return how many views a trial's test has, with its validations if it is trained.

    0 while the data is missing: a test is short beside the training of a benchmark.
    """
    if trial.fingerprint == ABSENT:
        return 0
    evaluation = trial.settings.evaluation
    views = evaluation.clips * evaluation.crops
    if evaluation.shuffled_frames:
        views *= 2
    if is_trained:
        views += trial.settings.recipe.epochs // evaluation.every_epochs
    return views * len(read_split(trial.settings.data, "val"))


def _measured_rates(study: Study, found: dict[str, AnyRecord]) -> list[float]:
    """Return the training GFLOPs a second of the study's finished trials."""
    runs: list[tuple[Trial, Record]] = [
        (trial, found[trial.key]) for trial in study.trials if trial.key in found
    ]
    return [
        run.metrics["throughput/clips_per_s"] * cost(trial.settings).train_gflops
        for trial, run in runs
        if "throughput/clips_per_s" in run.metrics
    ]


def _rates_of_store(records: Sequence[Record]) -> list[float]:
    """Return the training GFLOPs a second of some finished runs, of whatever study.

    A study of another seed or recipe has no finished trial of its own, but the machine is the same.
    """
    rates: list[float] = []
    for run in records:
        # Some runs are enough for a mean: reading the settings of thousands takes seconds.
        if len(rates) == _RUNS_FOR_A_RATE:
            break
        speed = run.metrics.get("throughput/clips_per_s")
        if speed is None or run.status != "FINISHED":
            continue
        try:
            rates.append(speed * cost(settings_of_identity(run.identity)).train_gflops)
        # A run of an earlier version may have settings that do not exist today.
        except (ValueError, KeyError, UserError):
            continue
    return rates


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
