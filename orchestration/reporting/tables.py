"""Tables: first the numbers (``TableInfo``), then Markdown, LaTeX, HTML, CSV or JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestration.reporting.rows import Row, axis_parts
from orchestration.reporting.significance import (
    ONE_TRAINING,
    Comparison,
    against_reference,
    are_apart,
    tells_apart,
)
from orchestration.reporting.study_results import StudyResults
from orchestration.studies.metrics import METRICS

Spread = Literal["interval", "std", "range"]
SPREADS: dict[Spread, str] = {
    "interval": "± the 95 % interval of the mean (Student's t)",
    "std": "± the standard deviation over seeds",
    "range": "[least, greatest] over seeds",
}
MISSING = "–"
QUOTED = "†"
ALIKE = "≈"


@dataclass(frozen=True)
class TableInfo:
    """All that a table shows, and nothing of how."""

    title: str
    axes: Sequence[str]
    """Names of the label columns."""
    columns: Sequence[str]
    """Quantities, by short name."""
    rows: Sequence[Row]
    pivot: int | None = None
    """The place, among the axes, of the one whose labels stand side by side."""
    delta: tuple[int, str] | None = None
    """An axis' place and the label of it that each row's gain in top-1 is over."""
    reference: str | None = None
    """The row that the others are compared with, video by video."""
    comparisons: Mapping[str, Comparison] = field(default_factory=dict[str, Comparison])
    """Row -> its top-1 less the reference's."""
    spread: Spread | None = None
    """What stands beside a mean over seeds; none: by their number."""
    own_notes: Sequence[str] = ()
    """What the study's file says below its table."""
    is_significant: Mapping[str, bool] = field(default_factory=dict[str, bool])
    """Quantity -> whether its best row is told apart from the next one: only then it is printed
    bold."""

    @property
    def common_seeds(self) -> int | None:
        """How many trainings each row has; none where they have different numbers."""
        counts = {row.finished for row in self.rows if not row.is_quoted}
        return counts.pop() if len(counts) == 1 else None

    def spread_of(self, count: int) -> Spread:
        """Return what stands beside a mean over so many seeds."""
        return self.spread or ("interval" if count > 2 else "range")

    @property
    def notes(self) -> list[str]:
        """What a reader must know.

        How many trials are missing, which videos were not counted, what is quoted.
        """
        finished = sum(row.finished for row in self.rows)
        wanted = sum(row.seeds for row in self.rows)
        if finished == wanted:
            missing = []
        else:
            missing = [f"{finished} of {wanted} trials are finished; {MISSING}: not there yet."]
        if any(row.is_quoted for row in self.rows):
            quoted = [f"{QUOTED}: as the paper quotes it; not run here."]
        else:
            quoted = []
        if self.comparisons:
            legend = [
                f"To {self.reference}: difference in top-1 over the same videos, 95 % interval; "
                f"{ALIKE}: these videos cannot tell the two apart (paired test, Holm's "
                "correction for "
                f"{len(self.comparisons)} rows, 5 %)."
                + (f" {ONE_TRAINING}" if max(row.seeds for row in self.rows) == 1 else "")
            ]
        else:
            legend = []
        return (
            missing
            + self._seed_notes
            + quoted
            + legend
            + [*self.own_notes, *(note for row in self.rows for note in row.notes)]
        )

    @property
    def _seed_notes(self) -> list[str]:
        """Say how many trainings a number is the mean of, and what stands beside it."""
        counts = {row.finished for row in self.rows if row.finished > 1}
        if not counts:
            return []
        meanings = {SPREADS[self.spread_of(count)] for count in counts}
        if self.common_seeds:
            number = f"n = {self.common_seeds} trainings a row; "
        else:
            number = ""
        return [f"{number}beside a mean: {' or '.join(sorted(meanings))}."]


def table_info(results: StudyResults) -> TableInfo:
    """Return the study's table as it stands in MLflow, its rows compared with the reference row."""
    study = results.study
    layout = study.file.table
    axes = axis_parts(study)
    pivot = axes.index(layout.pivot) if layout.pivot else None
    delta = next(((axes.index(axis), label) for axis, label in layout.delta.items()), None)
    is_significant = {name: _is_best_significant(results, name) for name in layout.columns}
    return TableInfo(
        study.file.title,
        axes,
        layout.columns,
        results.rows,
        pivot,
        delta,
        layout.reference,
        against_reference(results),
        layout.spread,
        study.file.notes,
        is_significant,
    )


def _is_best_significant(results: StudyResults, name: str) -> bool:
    """Whether a metric's best row differs significantly from the next.

    Over the videos for top-1, else over the seeds.

    What is counted and not measured (operations, parameters) always does.
    """
    if METRICS[name].source.startswith("cost.") or METRICS[name].source == "views":
        return True
    ordered = ranked(results.rows, name)
    if len(ordered) < 2:
        return False
    if name == "top1" and results.file_of:
        return tells_apart(results, ordered[0].label, ordered[1].label)
    return are_apart(ordered[0].cells[name].values, ordered[1].cells[name].values)


def ranked(rows: Sequence[Row], name: str) -> list[Row]:
    """Return our rows, the best first.

    None where one is not there yet or no value is better than another.
    """
    direction = METRICS[name].higher_is_better
    ours = [row for row in rows if not row.is_quoted]
    if direction is None or any(row.cells[name].mean is None for row in ours):
        return []
    return sorted(ours, key=lambda row: row.cells[name].mean or 0.0, reverse=direction)
