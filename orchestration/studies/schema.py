"""What a study file may say."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt

BETWEEN_LABELS = " / "
"""Joins the labels of a row; an axis and its labels may have it too, and then stand for several
columns."""


def label_parts(axis: str, label: str) -> list[str]:
    """Return a label's columns: several if the axis names several."""
    if BETWEEN_LABELS in axis:
        return label.split(BETWEEN_LABELS)
    return [label]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TableLayout(_Part):
    """Which table a study prints."""

    columns: tuple[str, ...] = ("top1", "top5", "gflops")
    """By their short names (``quantities.QUANTITIES``)."""
    pivot: str | None = None
    """An axis whose labels stand side by side, as columns of each quantity, and not one below the
    other."""
    reference: str | None = None
    """The row that others are compared with; none: no comparison."""
    delta: dict[str, str] = {}
    """Axis -> label: each row's gain in top-1 over the row with this label and otherwise its own
    (Table V's Δ)."""
    spread: Literal["interval", "std", "range"] | None = None
    """What stands beside a mean over seeds: the 95 % interval of the mean (Student's t), the seeds'
    standard deviation, or the least and the greatest. None: the interval from three seeds on, the
    range of two."""
    order: tuple[str, ...] = ()
    """Rows, quoted ones too, as they are printed; what is not named follows."""


class FigureLayout(_Part):
    """Which figure a study draws."""

    kind: Literal["points", "bars", "masks", "reconstructions"] = "bars"
    """``points``: one quantity against another. ``bars``: quantities side by side for each row.
    ``masks``: of each row, slice by slice. ``reconstructions``: of the first row's model."""
    x: str | None = None
    """Quantity on the horizontal axis, for ``points``."""
    y: tuple[str, ...] = ("top1",)
    """Quantities on the vertical axis."""
    group: str | None = None
    """An axis (or part of one) whose labels are series of their own, for ``points``."""
    front: bool = False
    """Join the points that no other beats in both quantities (Pareto front), for ``points``."""
    chance: bool = False
    """Draw the line of guessing, 100 / classes, percent."""


class StudyFile(_Part):
    """A study as it is written."""

    title: str
    """Printed above the table."""
    recipe: str
    """File of the settings that all trials share; a label's settings may name another
    ``recipe``."""
    seeds: tuple[NonNegativeInt, ...] = (0,)
    """Each setting is trained once with each."""
    fixed: dict[str, Any] = {}
    """Settings that differ from the recipe in all trials."""
    axes: dict[str, dict[str, dict[str, Any]]]
    """Axis -> printed label -> the settings that move together."""
    paper: dict[str, dict[str, float]] = {}
    """Quantity -> label (labels of several axes joined by " / ") -> what the paper printed."""
    baselines: dict[str, dict[str, float]] = {}
    """Rows of other methods, never trained here: label -> quantity -> what the paper quotes."""
    extra_columns: dict[str, dict[str, str]] = {}
    """Label of a row, quoted or not -> column of words -> what stands there."""
    claims: dict[str, tuple[str, ...]] = {}
    """What the paper concludes, in words -> comparisons of rows that would support it, each
    ``better > worse``."""
    notes: tuple[str, ...] = ()
    """What a reader of the table must know, printed below it."""
    table: TableLayout = TableLayout()
    figure: FigureLayout = FigureLayout()
