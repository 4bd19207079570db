"""From runs to the cells of a table: seeds, mean, interval, complete or partial."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from mar.model.flops import cost
from orchestration.studies.matching import Record
from orchestration.studies.metrics import METRICS, cost_figure
from orchestration.studies.schema import BETWEEN_LABELS, label_parts
from orchestration.studies.trial import Study, Trial

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cell:
    """One quantity of one row."""

    status: Literal["complete", "partial", "missing", "quoted"]
    """Of its seeds, all, some or none are there; ``quoted``: there is only what the paper says of
    another method."""
    values: tuple[float, ...] = ()
    """By seed."""
    paper: float | None = None
    """What the paper printed."""

    @property
    def mean(self) -> float | None:
        """The mean over seeds; none while nothing is there."""
        if self.values:
            return sum(self.values) / len(self.values)
        return None

    @property
    def half_width(self) -> float | None:
        """Half the 95 % confidence interval of the mean (Student's t).

        None with fewer than two seeds.
        """
        if len(self.values) < 2:
            return None
        return (
            statistics.stdev(self.values)
            / len(self.values) ** 0.5
            * _quantile(len(self.values) - 1)
        )

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds; none with fewer than two."""
        if len(self.values) > 1:
            return statistics.stdev(self.values)
        return None


@cache
def _quantile(freedom: int) -> float:
    from scipy import stats  # slow to import, and a plan needs no interval

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


@dataclass(frozen=True)
class Row:
    """One setting of a study, over its seeds."""

    labels: tuple[str, ...]
    """One for each axis."""
    cells: Mapping[str, Cell]
    """By quantity."""
    seeds: int
    finished: int
    notes: tuple[str, ...] = ()
    """What a reader must know of its numbers."""
    extra_columns: Mapping[str, str] = field(default_factory=dict[str, str])
    """Column of words -> what stands there."""
    is_quoted: bool = False
    """Whether it is another method's, quoted by the paper and never run here."""

    @property
    def label(self) -> str:
        """The labels of all axes, joined."""
        return BETWEEN_LABELS.join(part for part in self.labels if part)


def build_rows(study: Study, found: Mapping[str, Record]) -> list[Row]:
    """Return the study's rows in its order, with every metric that its report needs.

    ``found`` maps a trial's key to its finished run.
    """
    figure = study.file.figure
    wanted = {
        *study.file.table.columns,
        *figure.y,
        *([figure.x] if figure.x else []),
        "top1",
        "shuffled_top1",
    }
    grouped: dict[tuple[str, ...], list[Trial]] = {}
    for trial in study.trials:
        grouped.setdefault(tuple(trial.labels.values()), []).append(trial)
    extra_columns = study.file.extra_columns
    ours = [
        Row(
            tuple(
                part
                for each in zip(study.file.axes, labels, strict=True)
                for part in label_parts(*each)
            ),
            {name: _cell(study, name, trials, found) for name in wanted},
            len(trials),
            sum(trial.key in found for trial in trials),
            _notes(trials, found),
            extra_columns.get(trials[0].row, {}),
        )
        for labels, trials in grouped.items()
    ]
    quoted = [
        Row(
            _padded(label.split(BETWEEN_LABELS), len(axis_parts(study))),
            {name: Cell("quoted", (), values.get(name)) for name in wanted},
            0,
            0,
            (),
            extra_columns.get(label, {}),
            is_quoted=True,
        )
        for label, values in study.file.baselines.items()
    ]
    order = {label: rank for rank, label in enumerate(study.file.table.order)}
    return sorted([*quoted, *ours], key=lambda row: order.get(row.label, len(order)))


def _padded(parts: list[str], length: int) -> tuple[str, ...]:
    return (*parts, *[""] * (length - len(parts)))[:length]


def axis_parts(study: Study) -> list[str]:
    """Return the names of the label columns: an axis may have several."""
    return [part for axis in study.file.axes for part in label_parts(axis, axis)]


def _notes(trials: Sequence[Trial], found: Mapping[str, Record]) -> tuple[str, ...]:
    """Accuracy is over the videos that could be decoded: say so where some could not."""
    broken = {
        (int(metrics["test/num_broken"]), int(metrics["test/num_videos"]))
        for metrics in (found[trial.key].metrics for trial in trials if trial.key in found)
        if metrics.get("test/num_broken")
    }
    row = trials[0].row
    return tuple(
        f"{row}: over {whole} videos; {lost} more could not be decoded."
        for lost, whole in sorted(broken)
    )


def _cell(study: Study, name: str, trials: Sequence[Trial], found: Mapping[str, Record]) -> Cell:
    paper = study.file.paper.get(name, {}).get(trials[0].row)
    metric = METRICS[name]
    source = metric.source
    if source == "views":
        views = trials[0].settings.evaluation
        return Cell("complete", (float(views.crops * views.clips),), paper)
    if source.startswith("cost."):
        return Cell("complete", (cost_figure(cost(trials[0].settings), source),), paper)
    runs = [found[trial.key] for trial in trials if trial.key in found]
    values = tuple(
        metric.scale * run.metrics[source] + metric.offset for run in runs if source in run.metrics
    )
    if len(values) == len(trials):
        return Cell("complete", values, paper)
    return Cell("partial" if values else "missing", values, paper)
