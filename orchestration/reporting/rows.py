"""The rows of a table, made from runs: each cell has its seeds, mean, interval and status."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from mar.model.flops import cost
from orchestration.studies.matching import Record
from orchestration.studies.metrics import METRICS, cost_figure
from orchestration.studies.schema import BETWEEN_LABELS, label_parts
from orchestration.studies.trial import Study, Trial

CONFIDENCE = 0.95
"""Level of all confidence intervals; tests are at 1 minus this level."""


@dataclass(frozen=True)
class Cell:
    """One metric of one row."""

    status: Literal["complete", "partial", "missing", "quoted"]
    """``complete``, ``partial``, ``missing``: all, some or none of its seeds have a value.
    ``quoted``: it has only the paper's value for another method."""
    values: tuple[float, ...] = ()
    """One value for each finished seed."""
    paper: float | None = None
    """The value that the paper prints."""

    @property
    def mean(self) -> float | None:
        """The mean over seeds; none without a value."""
        if self.values:
            return sum(self.values) / len(self.values)
        return None

    @property
    def half_width(self) -> float | None:
        """Half the 95 % confidence interval of the mean (Student's t).

        None with fewer than two seeds.
        """
        # One value has no variance.
        if len(self.values) < 2:
            return None
        return (
            statistics.stdev(self.values)
            / len(self.values) ** 0.5
            * _quantile(len(self.values) - 1)
        )

    @property
    def reach(self) -> float | None:
        """Half of what a figure shows around the mean, as the table does by default.

        From three values that is the 95 % interval. With two it would be six times their distance
        and say nothing: their range stands for it. None with fewer.
        """
        if len(self.values) == 2:
            return (max(self.values) - min(self.values)) / 2
        return self.half_width

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds; none with fewer than two."""
        if len(self.values) > 1:
            return statistics.stdev(self.values)
        return None


# Cached: a report asks for a few numbers of seeds, thousands of times.
@cache
def _quantile(freedom: int) -> float:
    """Return the quantile of Student's t distribution for a two-sided interval."""
    # Imported here because scipy takes long to import and ``mar plan`` needs no interval.
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


@dataclass(frozen=True)
class Row:
    """One combination of labels of a study, over its seeds."""

    labels: tuple[str, ...]
    """One label for each label column (see :func:`axis_parts`)."""
    cells: Mapping[str, Cell]
    """By metric."""
    seeds: int
    """Number of values that it is a mean of: its seeds, or its folds (``table.mean_over``)."""
    finished: int
    """Number of these that are finished."""
    notes: tuple[str, ...] = ()
    """Notes on its numbers, printed below the table."""
    extra_columns: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name of a text column -> its text in this row."""
    is_quoted: bool = False
    """Whether the row is another method's, quoted by the paper and never run here."""

    @property
    def label(self) -> str:
        """The labels of all axes, joined."""
        return BETWEEN_LABELS.join(part for part in self.labels if part)


def build_rows(study: Study, found: Mapping[str, Record]) -> list[Row]:
    """Return the study's rows in its order, with every metric that its report needs.

    ``found`` maps a trial's key to its finished run.
    """
    figure = study.file.figure
    # ``findings`` needs both accuracies, whatever the table's columns are.
    wanted = {
        *study.file.table.columns,
        *figure.y,
        *([figure.x] if figure.x else []),
        "top1",
        "shuffled_top1",
    }
    # The trials of a row differ in their seeds, and in the axis over which it is a mean. A dict
    # keeps the study's order.
    axes = _row_axes(study)
    grouped: dict[tuple[str, ...], list[Trial]] = {}
    for trial in study.trials:
        grouped.setdefault(tuple(trial.labels[axis] for axis in axes), []).append(trial)
    extra_columns = study.file.extra_columns
    ours = [
        Row(
            tuple(part for each in zip(axes, labels, strict=True) for part in label_parts(*each)),
            {name: _cell(study, name, trials, found) for name in wanted},
            *_counts(study, trials, found),
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
    ours = _with_ratios(ours, study.file.table.reference)
    # Rows that ``order`` does not name follow in their own order, because ``sorted`` is stable.
    order = {label: rank for rank, label in enumerate(study.file.table.order)}
    return sorted([*quoted, *ours], key=lambda row: order.get(row.label, len(order)))


def _counts(study: Study, trials: Sequence[Trial], found: Mapping[str, Record]) -> tuple[int, int]:
    """Return how many values a row is a mean of, and how many of them are finished.

    They are its seeds, or else its folds; a fold is finished with all of its seeds.
    """
    axis = study.file.table.mean_over
    if axis is None:
        return len(trials), sum(trial.key in found for trial in trials)
    folds: dict[str, list[bool]] = {}
    for trial in trials:
        folds.setdefault(trial.labels[axis], []).append(trial.key in found)
    return len(folds), sum(all(each) for each in folds.values())


def _with_ratios(rows: Sequence[Row], reference: str | None) -> list[Row]:
    """Return rows whose ratio metrics are divided by those of the reference row."""
    base = next((row for row in rows if row.label == reference), None)
    base_cells: Mapping[str, Cell] = base.cells if base else {}
    changed: list[Row] = []
    for row in rows:
        ratios = {
            name: _ratio(cell, base_cells.get(name))
            for name, cell in row.cells.items()
            if METRICS[name].is_ratio
        }
        changed.append(replace(row, cells={**row.cells, **ratios}))
    return changed


def _ratio(cell: Cell, base: Cell | None) -> Cell:
    """Return a cell relative to the reference row's mean; it is missing without that mean."""
    if base is None or not base.mean:
        return Cell("missing", (), cell.paper)
    return Cell(cell.status, tuple(value / base.mean for value in cell.values), cell.paper)


def _padded(parts: list[str], length: int) -> tuple[str, ...]:
    """Return exactly ``length`` labels: a quoted method may have fewer labels than the table."""
    return (*parts, *[""] * (length - len(parts)))[:length]


def axis_parts(study: Study) -> list[str]:
    """Return the names of the label columns; one axis may have several."""
    return [part for axis in _row_axes(study) for part in label_parts(axis, axis)]


def _row_axes(study: Study) -> list[str]:
    """Return the axes whose labels tell rows apart: all but the one over which rows are means."""
    return [axis for axis in study.file.axes if axis != study.file.table.mean_over]


def _notes(trials: Sequence[Trial], found: Mapping[str, Record]) -> tuple[str, ...]:
    """Return a note for each number of test videos that could not be decoded.

    Accuracies are over the other videos.
    """
    # A set: seeds that lost the same videos have one note in common.
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
    """Return a metric of the row that ``trials`` (its seeds) form."""
    paper = study.file.paper.get(name, {}).get(trials[0].row)
    metric = METRICS[name]
    source = metric.source
    # Views and costs follow from the settings: they are known before any training.
    if source == "views":
        views = trials[0].settings.evaluation
        return Cell("complete", (float(views.crops * views.clips),), paper)
    if source.startswith("cost."):
        return Cell("complete", (cost_figure(cost(trials[0].settings), source),), paper)
    # A run of an earlier version may lack the metric: it counts as missing.
    measured = [
        trial for trial in trials if trial.key in found and source in found[trial.key].metrics
    ]
    values = {
        trial.key: metric.scale * found[trial.key].metrics[source] + metric.offset
        for trial in measured
    }
    # A fold's value is the mean over its seeds.
    axis = study.file.table.mean_over
    if axis is None:
        means = tuple(values[trial.key] for trial in measured)
    else:
        folds: dict[str, list[float]] = {}
        for trial in measured:
            folds.setdefault(trial.labels[axis], []).append(values[trial.key])
        means = tuple(sum(each) / len(each) for each in folds.values())
    if len(measured) == len(trials):
        return Cell("complete", means, paper)
    return Cell("partial" if means else "missing", means, paper)
