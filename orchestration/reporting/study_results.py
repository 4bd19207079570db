"""A study and the runs that answer its trials.

Matched once, and handed to everything that draws or prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from mar.errors import Failure, notice
from orchestration.reporting.rows import Row, build_rows
from orchestration.studies.matching import Record, match
from orchestration.studies.trial import Study

FileOf = Callable[[Any, str], Path]
"""Finds one file of a run's result, by the run and the file's name; downloads it where it is not on
this disk."""


def mention_lost_file(error: Exception) -> None:
    """Print a note that a file of a finished run cannot be read, and is left out of the report."""
    notice(f"{error}; what needs it is left out of tables, figures and claims")


@dataclass(frozen=True)
class StudyResults:
    """A study, and the finished runs of its trials."""

    study: Study
    runs: Mapping[str, Any]
    """Key of a trial -> its finished run (``Record``), of whatever study; a trial without one is
    missing."""
    file_of: FileOf | None = None
    """None: the runs' files are not at hand, and what needs them is left out."""

    @classmethod
    def match(cls, study: Study, records: Sequence[Record], file_of: FileOf | None = None) -> Self:
        """Return the results of a study, among the runs of all studies."""
        return cls(study, match(study.trials, records), file_of)

    def file(self, run: Any, name: str) -> Path | None:
        """Return one file of a run's result.

        None: the files are not at hand, or this one is lost; the user is told of the latter.
        """
        if self.file_of is None:
            return None
        try:
            return self.file_of(run, name)
        except (Failure, OSError) as error:
            mention_lost_file(error)
            return None

    @cached_property
    def rows(self) -> list[Row]:
        """The study's rows, in its order."""
        return build_rows(self.study, self.runs)

    @cached_property
    def run_ids(self) -> dict[str, str]:
        """Name of a trial -> the id of its run in MLflow."""
        trials = [trial for trial in self.study.trials if trial.key in self.runs]
        return {trial.name: str(self.runs[trial.key].run_id) for trial in trials}

    @cached_property
    def experiment_ids(self) -> list[str]:
        """The ids of the MLflow experiments that its runs are in."""
        ids = {str(getattr(run, "experiment_id", "")) for run in self.runs.values()}
        return sorted(ids - {""})

    def of(self, study: Study) -> Self:
        """Return the results of a study with some of the trials."""
        return replace(self, study=study)
