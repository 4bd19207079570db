"""The content of a study's table, independent of the format; ``table_formats`` prints it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestration.reporting.paired_tests import Comparison
from orchestration.reporting.rows import Row, axis_parts
from orchestration.reporting.significance import (
    ONE_TRAINING,
    against_reference,
    are_apart,
    tells_apart,
)
from orchestration.reporting.study_results import StudyResults
from orchestration.studies.metrics import METRICS

Spread = Literal["interval", "std", "range"]
SPREADS: dict[Spread, str] = {
    "interval": "± the 95 % interval of the mean (Student's t)",
    "std": "± the standard deviation",
    "range": "[least, greatest]",
}
# Marks in cells; the notes below the table explain each one that is used.
MISSING = "–"
QUOTED = "†"
ALIKE = "≈"


@dataclass(frozen=True)
class TableInfo:
    """The content of a table, independent of the format."""

    title: str
    axes: Sequence[str]
    """Names of the label columns."""
    columns: Sequence[str]
    """Short names of the metrics."""
    rows: Sequence[Row]
    pivot: int | None = None
    """Index in ``axes`` of the axis whose labels are columns side by side."""
    delta: tuple[int, str] | None = None
    """Index of an axis, and one of its labels: each row's gain in top-1 is relative to the row with
    this label."""
    reference: str | None = None
    """Label of the row that the others are compared with, video by video."""
    comparisons: Mapping[str, Comparison] = field(default_factory=dict[str, Comparison])
    """Row -> its top-1 minus the reference's."""
    spread: Spread | None = None
    """The measure of spread beside a mean over seeds. None: it depends on their number."""
    mean_over: str | None = None
    """The axis over whose labels each row is a mean."""
    own_notes: Sequence[str] = ()
    """The notes of the study's file."""
    name: str = ""
    """The study's name: LaTeX's label of the table."""
    is_significant: Mapping[str, bool] = field(default_factory=dict[str, bool])
    """Metric -> whether its best row differs significantly from the next one. Only then is it
    printed bold."""

    @property
    def common_seeds(self) -> int | None:
        """The number of trainings of each row; none if rows have different numbers."""
        # Quoted rows have no trainings.
        counts = {row.finished for row in self.rows if not row.is_quoted}
        return counts.pop() if len(counts) == 1 else None

    def spread_of(self, count: int) -> Spread:
        """Return the measure of spread that is printed beside a mean over ``count`` seeds."""
        # With two seeds Student's interval is so wide that it says nothing; the range shows both.
        return self.spread or ("interval" if count > 2 else "range")

    @property
    def notes(self) -> list[str]:
        """The notes below the table.

        They state how many trials are missing, which videos were not counted, and what is quoted.
        """
        finished = sum(row.finished for row in self.rows)
        wanted = sum(row.seeds for row in self.rows)
        if finished == wanted:
            missing = []
        else:
            what = "trials"
            if self.mean_over:
                what = f"folds ({self.mean_over})"
            missing = [f"{finished} of {wanted} {what} are finished; {MISSING}: not available yet."]
        if any(row.is_quoted for row in self.rows):
            quoted = [f"{QUOTED}: as the paper quotes it; not run here."]
        else:
            quoted = []
        if self.comparisons:
            # An interval from one training does not contain the variance between seeds.
            legend = [self._comparison_note]
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
    def _comparison_note(self) -> str:
        """The note that explains the column of differences from the reference row."""
        correction = "5 %"
        # A single row needs none.
        if len(self.comparisons) > 1:
            correction = f"Holm's correction for {len(self.comparisons)} rows, 5 %"
        if self.mean_over:
            return (
                f"To {self.reference}: difference in top-1, 95 % interval; {ALIKE}: no significant "
                f"difference (t test paired by {self.mean_over}, corrected for folds that share "
                f"training videos; {correction})."
            )
        note = (
            f"To {self.reference}: difference in top-1 over the same videos, 95 % interval; "
            f"{ALIKE}: no significant difference on these videos (paired test, {correction})."
        )
        if max(row.seeds for row in self.rows) == 1:
            note += f" {ONE_TRAINING}"
        return note

    @property
    def _seed_notes(self) -> list[str]:
        """The note on the number of trainings behind each mean, and on its measure of spread."""
        # A row with one training has no spread to explain.
        counts = {row.finished for row in self.rows if row.finished > 1}
        if not counts:
            return []
        meanings = {SPREADS[self.spread_of(count)] for count in counts}
        if self.common_seeds and self.mean_over:
            number = f"Each row is the mean over {self.common_seeds} labels of {self.mean_over}; "
        elif self.common_seeds:
            number = f"Each row is the mean over n = {self.common_seeds} trainings; "
        else:
            return [f"Beside a mean: {' or '.join(sorted(meanings))}."]
        return [f"{number}beside it: {' or '.join(sorted(meanings))}."]


def table_info(results: StudyResults) -> TableInfo:
    """Return the study's table from the runs in MLflow, with comparisons to the reference row."""
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
        layout.mean_over,
        study.file.notes,
        study.name,
        is_significant,
    )


def _is_best_significant(results: StudyResults, name: str) -> bool:
    """Whether a metric's best row differs significantly from the next.

    The test is over the videos for top-1, over the seeds for other metrics.
    """
    # Operations, parameters and views are computed, not measured: any difference is real.
    if METRICS[name].source.startswith("cost.") or METRICS[name].source == "views":
        return True
    ordered = ranked(results.rows, name)
    if len(ordered) < 2:
        return False
    # The paired test needs the runs' predictions, and is the more powerful one.
    if name == "top1" and results.file_of:
        return tells_apart(results, ordered[0].label, ordered[1].label)
    return are_apart(ordered[0].cells[name].values, ordered[1].cells[name].values)


def ranked(rows: Sequence[Row], name: str) -> list[Row]:
    """Return our rows by a metric, the best first.

    Empty if a row has no value yet, or if the metric has no better direction.
    """
    direction = METRICS[name].higher_is_better
    ours = [row for row in rows if not row.is_quoted]
    # A row that is still missing could become the best.
    if direction is None or any(row.cells[name].mean is None for row in ours):
        return []
    return sorted(ours, key=lambda row: row.cells[name].mean or 0.0, reverse=direction)
