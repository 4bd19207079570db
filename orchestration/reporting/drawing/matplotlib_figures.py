"""Draws figures as pictures: png, pdf or svg."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mar.errors import UserError
from mar.visualization.charts import save
from orchestration.reporting.figures import COLOURS, FigureInfo, Series, figure_info
from orchestration.reporting.study_results import StudyResults

_NOTE_WIDTH = 110
"""Characters in a line of the note below the figure."""
_LEVEL_CHARACTERS = 70
"""Most characters of all labels below the bars together; longer labels are rotated."""
_FEW = 6
"""Most points of a series, and most series, whose labels are large."""


def draw_figure(
    results: StudyResults,
    file: Path,
) -> None:
    """Draw a study's figure, of any kind.

    The suffix of ``file`` gives the format: png, pdf or svg.

    Raises:
        UserError: matplotlib does not write that format, or a model's reconstructions are missing.
    """
    study = results.study
    kind = study.file.figure.kind
    if kind == "masks":
        # Imports PyTorch, which the other figures do not need.
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
    """Draw a stored picture again, in the format of ``file``."""
    from matplotlib.image import imread

    pixels: Any = imread(picture)
    # In inches, at 160 pixels an inch.
    figure = Figure(figsize=(pixels.shape[1] / 160, pixels.shape[0] / 160))
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels)
    axes.axis("off")
    save(figure, file)


def draw(info: FigureInfo, file: Path) -> None:
    """Draw a figure; the suffix of ``file`` gives the format (png, pdf, svg).

    Raises:
        UserError: matplotlib does not write that format.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes: Any = figure.subplots()
    # A series and the paper's numbers for it have the same colour.
    names = list(dict.fromkeys(series.name.removesuffix(", paper") for series in info.series))
    labels: list[Any] = []
    for position, series in enumerate(info.series):
        if series.is_line:
            _line(axes, series, position, alone=info.kind == "curves")
            continue
        colour = COLOURS[names.index(series.name.removesuffix(", paper")) % len(COLOURS)]
        if info.kind == "bars":
            _bars(axes, info, series, position, colour)
        elif info.has_lines and not series.is_papers:
            _joined_points(axes, series, position)
        else:
            labels += _points(axes, series, colour)
    if info.chance is not None:
        label = f"chance level ({info.chance:g} %)"
        axes.axhline(info.chance, color="0.4", linestyle=":", label=label)
    axes.set(title=info.title, xlabel=info.x_title, ylabel=info.y_title)
    if info.has_log_x:
        axes.set_xscale("log")
    if len(info.series) > 1 or info.chance is not None:
        _legend(figure, axes, info)
    lacking = {"missing": info.missing, "some seeds missing": info.partial}
    note = "; ".join(f"{what}: {', '.join(labels)}" for what, labels in lacking.items() if labels)
    notes = textwrap.fill(note, _NOTE_WIDTH)
    # Out of the layout: a long note must not shrink the axes.
    axes.text(0.01, 0.01, notes, transform=axes.transAxes, fontsize=7, in_layout=False)
    axes.spines[["top", "right"]].set_visible(False)
    # Room for the labels of the outermost points.
    axes.margins(x=0.12, y=0.12)
    _separate(figure, axes, labels)
    save(figure, file)


def _separate(figure: Figure, axes: Any, labels: Sequence[Any]) -> None:
    """Move the points' labels apart; one that is moved far gets a line to its point."""
    if not labels:
        return
    # Imported here: it takes 0.3 s, and a table needs none of it.
    from adjustText import adjust_text

    # It needs the final sizes of axes and texts.
    figure.draw_without_rendering()
    # By a number of passes and not by seconds: the same picture on every machine.
    adjust_text(
        list(labels),
        ax=axes,
        iter_lim=300,
        expand=(1.05, 1.3),
        arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5},
    )


def _legend(figure: Figure, axes: Any, info: FigureInfo) -> None:
    """Name the series, beside points and curves and below bars."""
    size = 7 if len(info.series) > _FEW else None
    # Bars and lines fill the axes: there is no place inside that they leave free.
    if info.kind == "bars" or info.has_lines:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=size)
    else:
        axes.legend(frameon=False, fontsize=size)


def _line(axes: Any, series: Series, position: int, alone: bool) -> None:
    """Draw a curve, or (not ``alone``) a Pareto front below the points of the figure."""
    if alone:
        # With more curves than colours, the style of the line distinguishes those of one colour.
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


def _joined_points(axes: Any, series: Series, position: int) -> None:
    """Draw the points of a series, from the left to the right, and lines between them."""
    points = sorted(zip(series.x, series.y, series.error, strict=True))
    axes.errorbar(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        yerr=[error for _, _, error in points],
        fmt="o-" if position < len(COLOURS) else "s--",
        color=COLOURS[position % len(COLOURS)],
        label=series.name,
        capsize=2,
        markersize=4,
        linewidth=1.2,
    )


def _points(axes: Any, series: Series, colour: str) -> list[Any]:
    """Draw the points of a series, and return their labels; the paper's points are not filled."""
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
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
    if len(series.labels) > _FEW:
        style["fontsize"] = 6
    if series.is_papers:
        style |= {"color": "0.45", "fontsize": 6}
    points = zip(series.labels, series.x, series.y, strict=True)
    return [axes.text(x, y, label, **style) for label, x, y in points]


def _bars(axes: Any, info: FigureInfo, series: Series, position: int, colour: str) -> None:
    """Draw one bar of each row; the bars of all series stand side by side."""
    # The bars of a row take 0.8 of its place, centred on the row's position.
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
    # The ticks are common to all series: they are set once.
    if position == 0:
        slanting: dict[str, Any] = {"rotation": 30, "ha": "right", "fontsize": 7}
        is_long = sum(len(row) for row in info.rows) > _LEVEL_CHARACTERS
        axes.set_xticks(range(len(info.rows)), info.rows, **(slanting if is_long else {}))
