"""Figures: first the numbers (``FigureInfo``), then the drawing."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mar.errors import UserError
from mar.visualization.charts import save
from orchestration.reporting.rows import Row, axis_parts
from orchestration.reporting.study_results import StudyResults
from orchestration.studies.metrics import METRICS
from orchestration.studies.schema import BETWEEN_LABELS

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#B2A400")
"""Of Okabe and Ito: told apart by colour-blind readers too."""
_ABOVE = (0, 7)
_NOTE_WIDTH = 110
_LEVEL_CHARACTERS = 70
"""Of all labels below the bars together; longer ones are written slanting."""
_FEW = 6
"""Points whose labels stand level; more are written slanting and small."""


@dataclass(frozen=True)
class Series:
    """One quantity over the rows that have it."""

    name: str
    labels: Sequence[str]
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float]
    """Half widths of 95 % intervals; 0 with one seed."""
    is_papers: bool = False
    """Whether these are what the paper printed."""
    is_line: bool = False
    """Whether its points are joined: the epochs of a training, the Pareto front."""


@dataclass(frozen=True)
class FigureInfo:
    """All that a figure shows, and nothing of how."""

    title: str
    kind: str
    """points, bars or curves."""
    x_title: str
    y_title: str
    series: Sequence[Series]
    chance: float | None
    """Percent, where guessing is drawn."""
    rows: Sequence[str]
    """All of them, in the study's order."""
    missing: Sequence[str]
    """Rows that have nothing yet."""
    partial: Sequence[str]
    """Rows of which some seeds are not there yet."""

    def frame(self) -> pd.DataFrame:
        """Return the points, to travel with the picture."""
        return pd.DataFrame(
            {"series": series.name, "row": label, "x": x, "y": y, "half_width": error}
            for series in self.series
            for label, x, y, error in zip(
                series.labels, series.x, series.y, series.error, strict=True
            )
        )


def figure_info(results: StudyResults) -> FigureInfo:
    """Return the study's figure as it stands in MLflow."""
    study = results.study
    layout = study.file.figure
    all_rows = [row for row in results.rows if not row.is_quoted]
    if layout.group:
        part = axis_parts(study).index(layout.group)
    else:
        part = None
    if part is not None:
        groups = list(dict.fromkeys(row.labels[part] for row in all_rows))
    else:
        groups = [None]
    series: list[Series] = []
    for name in layout.y:
        for group in groups:
            positions = [
                (position, row)
                for position, row in enumerate(all_rows)
                if part is None or row.labels[part] == group
            ]
            title = METRICS[name].title if group is None else group
            series.append(_series(title, positions, name, layout.x, part))
            series += [_papers(f"{title}, paper", positions, name, layout.x)] if layout.x else []
    if layout.x:
        quoted = [(0, row) for row in results.rows if row.is_quoted]
        series += [_papers("quoted by the paper", quoted, name, layout.x) for name in layout.y]
    series = [each for each in series if each.y or not each.is_papers]
    if layout.front and layout.x:
        directions = [METRICS[name].higher_is_better for name in (layout.x, layout.y[0])]
        for each in [each for each in series if not each.is_papers]:
            if groups == [None]:
                name = "Pareto front"
            else:
                name = f"Pareto front, {each.name}"
            series.append(
                _front(
                    name,
                    each,
                    is_low_x_better=not directions[0],
                    is_high_y_better=bool(directions[1]),
                )
            )
    return FigureInfo(
        title=study.file.title,
        kind=layout.kind,
        x_title=METRICS[layout.x].title if layout.x else ", ".join(study.file.axes),
        y_title=METRICS[layout.y[0]].title
        if len(layout.y) == 1
        else "Top-1 (%)"
        if "top1" in layout.y
        else "",
        series=series,
        chance=100 / study.trials[0].settings.data.num_classes if layout.chance else None,
        rows=[row.label for row in all_rows],
        missing=[row.label for row in all_rows if not row.finished],
        partial=[row.label for row in all_rows if 0 < row.finished < row.seeds],
    )


def _series(
    title: str, positions: Sequence[tuple[int, Row]], name: str, x: str | None, part: int | None
) -> Series:
    """Return a quantity of some rows; ``part`` of their labels is in the title already."""
    there = [(position, row) for position, row in positions if row.cells[name].mean is not None]
    there = [
        (position, row) for position, row in there if x is None or row.cells[x].mean is not None
    ]
    return Series(
        title,
        [
            BETWEEN_LABELS.join(
                each for position, each in enumerate(row.labels) if position != part
            )
            for _, row in there
        ],
        [(row.cells[x].mean or 0.0) if x else float(position) for position, row in there],
        [row.cells[name].mean or 0.0 for _, row in there],
        [row.cells[name].half_width or 0.0 for _, row in there],
    )


def _front(name: str, series: Series, is_low_x_better: bool, is_high_y_better: bool) -> Series:
    """Return the Pareto front of a series, along the horizontal axis.

    The points that no other beats in both metrics.
    """
    points = list(zip(series.labels, series.x, series.y, strict=True))
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
    """Return the points of which the paper prints both."""
    points: list[tuple[str, float, float]] = []
    for _, row in positions:
        pivot = row.cells[x].paper
        up = row.cells[name].paper
        if pivot is not None and up is not None:
            points.append((row.label, pivot, up))
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


def draw_figure(
    results: StudyResults,
    file: Path,
) -> None:
    """Draw a study's figure, of whatever kind.

    The ending of ``file`` says the format: png, pdf or svg.

    Raises:
        UserError: matplotlib does not write that format, or a model's reconstructions are not there
            yet.
    """
    study = results.study
    kind = study.file.figure.kind
    if kind == "masks":
        from mar.visualization.masks_and_clips import draw_masks, example_masks

        drawn = {
            trial.row: example_masks(trial.settings, 1)["training, clip 1"]
            for trial in study.trials
        }
        draw_masks(drawn, study.file.title, file)
    elif kind == "reconstructions":
        runs = list(results.runs.values())
        # Any run of the study has the picture; one whose files are lost does not stop the report.
        pictures = (results.file(run, "reconstructions.png") for run in runs)
        picture = next((each for each in pictures if each is not None), None)
        if picture is None:
            raise UserError(f"{study.name}: no reconstruction yet: mar run {study.name}")
        _copy_picture(picture, file)
    else:
        draw(figure_info(results), file)


def _copy_picture(picture: Path, file: Path) -> None:
    from matplotlib.image import imread

    pixels: Any = imread(picture)
    figure = Figure(figsize=(pixels.shape[1] / 160, pixels.shape[0] / 160))
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels)
    axes.axis("off")
    save(figure, file)


def draw(info: FigureInfo, file: Path) -> None:
    """Draw the figure; the ending of ``file`` says the format (png, pdf, svg).

    Raises:
        UserError: matplotlib does not write that format.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes: Any = figure.subplots()
    names = list(dict.fromkeys(series.name.removesuffix(", paper") for series in info.series))
    for position, series in enumerate(info.series):
        if series.is_line:
            _line(axes, series, position, alone=info.kind == "curves")
            continue
        colour = COLOURS[names.index(series.name.removesuffix(", paper")) % len(COLOURS)]
        if info.kind == "bars":
            _bars(axes, info, series, position, colour)
        else:
            _points(axes, series, colour)
    if info.chance is not None:
        axes.axhline(info.chance, color="0.4", linestyle=":", label=f"guessing ({info.chance:g} %)")
    axes.set(title=info.title, xlabel=info.x_title, ylabel=info.y_title)
    if len(info.series) > 1 or info.chance is not None:
        axes.legend(frameon=False, fontsize=7 if len(info.series) > _FEW else None)
    lacking = {"missing": info.missing, "seeds not there yet": info.partial}
    note = "; ".join(f"{what}: {', '.join(labels)}" for what, labels in lacking.items() if labels)
    notes = textwrap.fill(note, _NOTE_WIDTH)
    axes.text(0.01, 0.01, notes, transform=axes.transAxes, fontsize=7, in_layout=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.12)
    save(figure, file)


def _line(axes: Any, series: Series, position: int, alone: bool) -> None:
    if alone:
        if position < len(COLOURS):
            style = "-"
        else:
            style = "--" if position < 2 * len(COLOURS) else ":"
        axes.plot(
            series.x,
            series.y,
            style,
            marker=".",
            color=COLOURS[position % len(COLOURS)],
            label=series.name,
            linewidth=1.4,
        )
    else:
        axes.plot(series.x, series.y, "-", color="0.6", label=series.name, linewidth=1, zorder=1)


def _points(axes: Any, series: Series, colour: str) -> None:
    if series.is_papers:
        axes.plot(series.x, series.y, "o", color=colour, markerfacecolor="none", label=series.name)
    else:
        axes.errorbar(
            series.x,
            series.y,
            yerr=series.error,
            fmt="o",
            color=colour,
            label=series.name,
            capsize=3,
        )
    many = len(series.labels) > _FEW
    style: dict[str, Any] = {"ha": "center", "fontsize": 8}
    if many:
        style = {"ha": "left", "rotation": 35, "fontsize": 6}
    style |= {"color": "0.45", "fontsize": 6} if series.is_papers else {}
    for label, x, y in zip(series.labels, series.x, series.y, strict=True):
        axes.annotate(label, (x, y), textcoords="offset points", xytext=_ABOVE, **style)


def _bars(axes: Any, info: FigureInfo, series: Series, position: int, colour: str) -> None:
    width = 0.8 / len(info.series)
    shift = (position - (len(info.series) - 1) / 2) * width
    axes.bar(
        [x + shift for x in series.x],
        series.y,
        width,
        yerr=series.error,
        color=colour,
        label=series.name,
        capsize=3,
    )
    if position == 0:
        slanting: dict[str, Any] = {"rotation": 30, "ha": "right", "fontsize": 7}
        is_long = sum(len(row) for row in info.rows) > _LEVEL_CHARACTERS
        axes.set_xticks(range(len(info.rows)), info.rows, **(slanting if is_long else {}))
