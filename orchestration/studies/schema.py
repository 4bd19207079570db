"""A study file's content: its keys, their types and defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt

BETWEEN_LABELS = " / "
"""Joins the labels of a row. An axis and its labels may contain it too, and then make several
columns."""


def label_parts(axis: str, label: str) -> list[str]:
    """Return a label's text in each column of its axis."""
    # The label of an axis with one column may have " / " in it and is not split.
    if BETWEEN_LABELS in axis:
        return label.split(BETWEEN_LABELS)
    return [label]


class _Part(BaseModel):
    # ``extra="forbid"`` makes a misspelt key an error. It would be ignored otherwise.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TableLayout(_Part):
    """The table that a study prints."""

    columns: tuple[str, ...] = ("top1", "top5", "gflops")
    """Short names of metrics (``metrics.METRICS``)."""
    pivot: str | None = None
    """An axis whose labels become columns of each metric, side by side, instead of rows."""
    mean_over: str | None = None
    """An axis, as the folds of a cross-validation, over whose labels each row is a mean; its
    interval, and the comparison of two rows, are over these labels."""
    reference: str | None = None
    """The row that others are compared with; none: no comparison."""
    delta: dict[str, str] = {}
    """Axis -> label: a column with each row's gain in top-1 over the row that has this label and
    otherwise the same labels (Table V's Δ)."""
    spread: Literal["interval", "std", "range"] | None = None
    """What is printed beside a mean over seeds: the 95 % interval of the mean (Student's t), the
    seeds' standard deviation, or the least and the greatest value. None: the interval from three
    seeds on, the range of two."""
    order: tuple[str, ...] = ()
    """Rows in the order in which they are printed, baselines too; rows that are not named
    follow."""


class FigureLayout(_Part):
    """The figure that a study draws."""

    kind: Literal["points", "bars", "masks", "reconstructions"] = "bars"
    """``points``: one metric against another. ``bars``: metrics side by side for each row.
    ``masks``: each row's mask, slice by slice. ``reconstructions``: clips as the first row's model
    reconstructs them."""
    x: str | None = None
    """Metric on the horizontal axis, for ``points``."""
    y: tuple[str, ...] = ("top1",)
    """Metrics on the vertical axis."""
    group: str | None = None
    """An axis (or part of one) that makes a series of each of its labels, for ``points``."""
    lines: bool = False
    """Whether to join the points of each series, which the legend alone then names, for
    ``points``."""
    front: bool = False
    """Whether to join the points that no other beats in both metrics (Pareto front), for
    ``points``."""
    chance: bool = False
    """Whether to draw a line at chance level: 100 / classes, in percent."""


class StudyFile(_Part):
    """A study file as it is written."""

    # Axes, labels and metrics that a file names are checked in ``validation.check_references``:
    # which ones exist is known only after the trials are listed.

    title: str
    """Printed above the table."""
    recipe: str
    """File of the settings that all trials share; a label's settings may name another
    ``recipe``."""
    seeds: tuple[NonNegativeInt, ...] = (0,)
    """Each row is trained once with each seed."""
    fixed: dict[str, Any] = {}
    """Settings that differ from the recipe in all trials."""
    axes: dict[str, dict[str, dict[str, Any]]]
    """Axis -> printed label -> the settings that this label changes together."""
    paper: dict[str, dict[str, float]] = {}
    """Metric -> row (labels of several axes joined by " / ") -> the value printed in the paper."""
    baselines: dict[str, dict[str, float]] = {}
    """Rows of other methods, never trained here: row -> metric -> the value quoted in the paper."""
    extra_columns: dict[str, dict[str, str]] = {}
    """Row, a baseline too -> title of a text column -> its text."""
    claims: dict[str, tuple[str, ...]] = {}
    """A conclusion of the paper, in words -> comparisons of rows that would support it, each
    ``better > worse``."""
    notes: tuple[str, ...] = ()
    """Notes that are printed below the table."""
    table: TableLayout = TableLayout()
    figure: FigureLayout = FigureLayout()
