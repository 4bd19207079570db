"""Which rows of a study differ significantly, and the verdicts on the paper's claims.

From each run's stored predictions; the tests are in ``paired_tests``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mar.errors import Failure
from mar.evaluation import correctness
from orchestration.reporting.paired_tests import (
    NO_FOLD,
    Answers,
    Comparison,
    Correctness,
    compare_rows,
    holm_corrected,
)
from orchestration.reporting.rows import CONFIDENCE
from orchestration.reporting.study_results import FileOf, StudyResults, mention_lost_file
from orchestration.studies.matching import Record
from orchestration.studies.trial import Trial

IN_ONE = " in one training"
"""Suffix of a claim's verdict if some of its rows have one training: another seed might give
another verdict."""
ONE_TRAINING = "One training for each row: the interval does not contain the effect of other seeds."
Verdict = Literal[
    "supported",
    "supported in one training",
    "contradicted",
    "contradicted in one training",
    "open",
    "open in one training",
    "missing",
]


@dataclass(frozen=True)
class Claim:
    """A conclusion of the paper, and the verdict of our runs on it."""

    text: str
    verdict: Verdict
    pairs: Mapping[str, Comparison | None]
    """``better > worse`` -> the first row's top-1 minus the second's, corrected over the claim's
    pairs. None: a run is missing."""


def read_correctness(run: Record, file_of: FileOf) -> Correctness:
    """Return which videos a run classified correctly.

    A result without a readable correctness file is read from its predictions.
    """

    def from_predictions() -> dict[str, bool]:
        # File names on Linux may be no UTF-8: surrogateescape keeps their bytes.
        with file_of(run, "predictions.csv").open(
            newline="", encoding="utf-8", errors="surrogateescape"
        ) as lines:
            return {
                line["video"]: line["label"] == line["class_1"] for line in csv.DictReader(lines)
            }

    # The small file first: it has two kilobytes, the predictions of 20,000 videos two megabytes.
    try:
        correct, videos_digest = correctness.read_correctness(file_of(run, correctness.CORRECTNESS))
    except (Failure, FileNotFoundError):
        return Correctness.of(from_predictions())
    return Correctness(correct, videos_digest, lambda: [*from_predictions()])


def against_reference(results: StudyResults) -> dict[str, Comparison]:
    """Return each finished row's difference from the table's reference row.

    The p values are corrected for the number of rows.
    """
    reference = results.study.file.table.reference
    if reference is None:
        return {}
    rows = _correctness_of_rows(results)
    if reference not in rows:
        return {}
    gaps = {
        row: compare_rows(correct, rows[reference])
        for row, correct in rows.items()
        if row != reference
    }
    return {row: gap for row, gap in holm_corrected(gaps).items() if gap is not None}


def tells_apart(results: StudyResults, row: str, other: str) -> bool:
    """Whether the videos tell two rows' top-1 apart, at 5 %; not where one has no predictions."""
    rows = _correctness_of_rows(results, {row, other})
    if row not in rows or other not in rows:
        return False
    comparison = compare_rows(rows[row], rows[other])
    return comparison is not None and comparison.is_significant


def are_apart(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two means of a measured metric differ significantly over seeds, at 5 %.

    By Welch's t test; false with one seed, which has no variance.
    """
    # Imported here because scipy takes long to import and ``mar plan`` does not need it.
    from scipy import stats

    if min(len(ours), len(theirs)) < 2:
        return False
    # Without any spread, t would be a division by zero.
    if len({*ours}) == len({*theirs}) == 1:
        return ours[0] != theirs[0]
    tested: Any = stats.ttest_ind(ours, theirs, equal_var=False)
    return float(tested.pvalue) < 1 - CONFIDENCE


def claims(results: StudyResults) -> list[Claim]:
    """Return the verdict of our runs on each of the study's claims."""
    stated = results.study.file.claims
    if not stated:
        return []
    rows = _correctness_of_rows(results)
    return [_judged(text, pairs, rows) for text, pairs in stated.items()]


def _judged(text: str, pairs: Sequence[str], rows: Mapping[str, Answers]) -> Claim:
    """Return a claim with its verdict.

    Supported: every pair differs significantly, in the paper's direction. Contradicted: at least
    one pair differs significantly in the other direction. Missing: a run is missing. Else open.
    """
    gaps: dict[str, Comparison | None] = {}
    for pair in pairs:
        better, worse = pair.split(" > ")
        if better in rows and worse in rows:
            gaps[pair] = compare_rows(rows[better], rows[worse])
        else:
            gaps[pair] = None
    gaps = holm_corrected(gaps)
    present = [gap for gap in gaps.values() if gap is not None]
    significant = [gap for gap in present if gap.is_significant]
    is_one_training = any(gap.num_seeds == 1 for gap in present)
    verdict: Verdict = "open"
    if is_one_training:
        verdict = "open in one training"
    # One pair is enough to contradict, so this is known before all runs are finished.
    if any(gap.difference < 0 for gap in significant):
        if is_one_training:
            verdict = "contradicted in one training"
        else:
            verdict = "contradicted"
    elif None in gaps.values():
        verdict = "missing"
    elif len(significant) == len(gaps):
        if is_one_training:
            verdict = "supported in one training"
        else:
            verdict = "supported"
    return Claim(text, verdict, gaps)


def _correctness_of_rows(results: StudyResults, only: set[str] | None = None) -> dict[str, Answers]:
    """Return, for each row with all trials finished, which videos each model gets right.

    With ``only``, of some rows. A row with a result whose files are lost is left out: the user is
    told, and the rest of a report does not fail for it.
    """
    found = results.runs
    file_of = results.file_of
    if file_of is None:
        return {}
    grouped: dict[str, list[Trial]] = {}
    for trial in results.study.trials:
        if only is None or trial.row in only:
            grouped.setdefault(trial.row, []).append(trial)
    read: dict[str, Correctness] = {}

    # Several trials may have the same run: it is read once.
    def answers_of(trial: Trial) -> Correctness:
        run = found[trial.key]
        if run.run_id not in read:
            read[run.run_id] = read_correctness(run, file_of)
        # A run may have been logged before a setting existed: the trial knows the training.
        return replace(read[run.run_id], training=trial.training)

    correct: dict[str, Answers] = {}
    for row, trials in grouped.items():
        if any(trial.key not in found for trial in trials):
            continue
        folds: dict[str, list[Correctness]] = {}
        try:
            for trial in trials:
                fold = NO_FOLD
                if trial.averaged_axis is not None:
                    fold = trial.labels[trial.averaged_axis]
                folds.setdefault(fold, []).append(answers_of(trial))
        except (Failure, OSError) as error:
            mention_lost_file(error)
        else:
            correct[row] = folds
    return correct
