"""The numbers of a study's figure; ``reporting.drawing`` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from orchestration.reporting.rows import Row, axis_parts
from orchestration.reporting.study_results import StudyResults
from orchestration.studies.metrics import METRICS
from orchestration.studies.schema import BETWEEN_LABELS

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#B2A400")
"""The palette of Okabe and Ito: colour-blind readers can distinguish its colours."""
_WIDE_RANGE = 30
"""Largest ratio of two x values on a linear scale."""


@dataclass(frozen=True)
class Series:
    """One metric over the rows that have it."""

    name: str
    labels: Sequence[str]
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float]
    """Half widths of 95 % intervals, with two seeds of their range; 0 with one seed."""
    is_papers: bool = False
    """Whether the values are the paper's printed ones."""
    is_line: bool = False
    """Whether its points are joined, as for the epochs of a training or a Pareto front."""


@dataclass(frozen=True)
class FigureInfo:
    """The content of a figure, independent of the library that draws it."""

    title: str
    kind: str
    """``points``, ``bars`` or ``curves``."""
    x_title: str
    y_title: str
    series: Sequence[Series]
    chance: float | None
    """Accuracy at chance level in percent. None: its line is not drawn."""
    rows: Sequence[str]
    """Labels of all rows, in the study's order."""
    missing: Sequence[str]
    """Rows without a finished trial."""
    partial: Sequence[str]
    """Rows with some, but not all, seeds finished."""
    has_lines: bool = False
    """Whether the points of each series are joined."""

    @property
    def has_log_x(self) -> bool:
        """Whether x has a logarithmic scale: points of such different costs would share a column.

        A small model of ours may stand beside the paper's, which costs thousands of times as much.
        """
        values = [x for series in self.series for x in series.x]
        if self.kind != "points" or not values or min(values) <= 0:
            return False
        return max(values) / min(values) > _WIDE_RANGE

    def frame(self) -> pd.DataFrame:
        """Return the points as a table, which is stored beside the picture."""
        return pd.DataFrame(
            {"series": series.name, "row": label, "x": x, "y": y, "half_width": error}
            for series in self.series
            for label, x, y, error in zip(
                series.labels, series.x, series.y, series.error, strict=True
            )
        )


def figure_info(results: StudyResults) -> FigureInfo:
    """Return the numbers of the study's figure, from the runs in MLflow."""
    study = results.study
    layout = study.file.figure
    # Quoted rows have no runs of ours: they appear only in the series of the paper's numbers.
    all_rows = [row for row in results.rows if not row.is_quoted]
    if layout.group:
        part = axis_parts(study).index(layout.group)
    else:
        part = None
    # Each label of the group's axis is a series of its own. None stands for a series of all rows.
    if part is not None:
        groups = list(dict.fromkeys(row.labels[part] for row in all_rows))
    else:
        groups = [None]
    series: list[Series] = []
    for name in layout.y:
        for group in groups:
            # The position counts over all groups: it is the row's place on the axis of bars.
            positions = [
                (position, row)
                for position, row in enumerate(all_rows)
                if part is None or row.labels[part] == group
            ]
            title = METRICS[name].title if group is None else group
            series.append(_series(title, positions, name, layout.x, part))
            if layout.x:
                series.append(_papers(f"{title}, paper", positions, name, layout.x))
    if layout.x:
        quoted = [(0, row) for row in results.rows if row.is_quoted]
        series += [_papers("quoted by the paper", quoted, name, layout.x) for name in layout.y]
    # An empty series of ours stays: the colours of the others do not depend on what is finished.
    series = [each for each in series if each.y or not each.is_papers]
    if layout.front and layout.x:
        series += _fronts(series, layout.x, layout.y[0], has_groups=groups != [None])
    return FigureInfo(
        title=study.file.title,
        kind=layout.kind,
        x_title=METRICS[layout.x].title if layout.x else ", ".join(study.file.axes),
        y_title=_y_title(layout.y),
        series=series,
        chance=100 / study.trials[0].settings.data.num_classes if layout.chance else None,
        rows=[row.label for row in all_rows],
        missing=[row.label for row in all_rows if not row.finished],
        partial=[row.label for row in all_rows if 0 < row.finished < row.seeds],
        has_lines=layout.lines,
    )


def _y_title(names: Sequence[str]) -> str:
    """Return the title of the vertical axis; empty if the metrics have no common unit."""
    if len(names) == 1:
        return METRICS[names[0]].title
    # The figures with several metrics compare top-1 under different conditions.
    if "top1" in names:
        return "Top-1 (%)"
    return ""


def _series(
    title: str, positions: Sequence[tuple[int, Row]], name: str, x: str | None, part: int | None
) -> Series:
    """Return a metric of some rows.

    Labels leave out the axis part with index ``part``, which is in the title already.
    """
    present = [(position, row) for position, row in positions if row.cells[name].mean is not None]
    present = [
        (position, row) for position, row in present if x is None or row.cells[x].mean is not None
    ]
    return Series(
        title,
        [
            BETWEEN_LABELS.join(
                each for position, each in enumerate(row.labels) if position != part
            )
            for _, row in present
        ],
        [(row.cells[x].mean or 0.0) if x else float(position) for position, row in present],
        [row.cells[name].mean or 0.0 for _, row in present],
        [row.cells[name].reach or 0.0 for _, row in present],
    )


def _fronts(series: Sequence[Series], x: str, y: str, has_groups: bool) -> list[Series]:
    """Return the Pareto front of each series of ours."""
    is_low_x_better = not METRICS[x].higher_is_better
    is_high_y_better = bool(METRICS[y].higher_is_better)
    fronts: list[Series] = []
    for each in series:
        if each.is_papers:
            continue
        name = "Pareto front"
        if has_groups:
            name = f"Pareto front, {each.name}"
        fronts.append(_front(name, each, is_low_x_better, is_high_y_better))
    return fronts


def _front(name: str, series: Series, is_low_x_better: bool, is_high_y_better: bool) -> Series:
    """Return the Pareto front of a series: the points that no other point beats in both metrics."""
    points = list(zip(series.labels, series.x, series.y, strict=True))
    # The signs turn both metrics so that lower is better. Then one pass along x is enough: a point
    # is on the front if its y is better than that of every point before it.
    x_sign = 1 if is_low_x_better else -1
    y_sign = -1 if is_high_y_better else 1
    front: list[tuple[str, float, float]] = []
    for point in sorted(points, key=lambda point: (x_sign * point[1], y_sign * point[2])):
        if not front or y_sign * point[2] < y_sign * front[-1][2]:
            front.append(point)
    labels = [each[0] for each in front]
    x = [each[1] for each in front]
    y = [each[2] for each in front]
    return Series(name, labels, x, y, [0.0] * len(front), is_line=True)


def _papers(title: str, positions: Sequence[tuple[int, Row]], name: str, x: str) -> Series:
    """Return the rows for which the paper prints both metrics."""
    points: list[tuple[str, float, float]] = []
    for _, row in positions:
        pivot = row.cells[x].paper
        up = row.cells[name].paper
        if pivot is not None and up is not None:
            points.append((row.label, pivot, up))
    # ``zip(*points)`` would give no columns at all when there are no points.
    columns = [[point[column] for point in points] for column in range(3)]
    labels, xs, ys = columns
    return Series(
        title,
        [str(label) for label in labels],
        [float(v) for v in xs],
        [float(v) for v in ys],
        [0.0] * len(points),
        is_papers=True,
    )
