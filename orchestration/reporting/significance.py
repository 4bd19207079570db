"""Significance of differences: paired comparisons of rows, from each run's stored predictions.

Two models that are tested on the same videos are compared video by video. Most differences between
ablations are smaller than the standard error of either accuracy (0.32 points at 71 % of 20,000
videos), so only a paired test can detect them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mar.errors import Failure
from mar.evaluation import correctness
from orchestration.reporting.rows import CONFIDENCE
from orchestration.reporting.study_results import FileOf, StudyResults, mention_lost_file
from orchestration.studies.matching import Record
from orchestration.studies.trial import Trial

IN_ONE = " in one training"
"""Suffix of a claim's verdict if some of its rows have one training: another seed might give
another verdict."""
ONE_TRAINING = "One training for each row: the interval does not contain the effect of other seeds."
_NO_FOLD = ""
"""The fold of a row that is not a mean over folds."""
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
class Correctness:
    """Which test videos a model classified correctly."""

    correct: npt.NDArray[np.bool_]
    videos_digest: str
    """Digest of the videos' names in their order
    (``mar.evaluation.correctness.videos_digest``)."""
    names: Callable[[], list[str]]
    """Reads the videos' names; called only when two models were tested on different videos."""

    @classmethod
    def of(cls, correct: Mapping[str, bool]) -> Correctness:
        """Return the correctness from a mapping of each video's name to whether it was right."""
        return cls(
            np.array([*correct.values()], dtype=bool),
            correctness.videos_digest(correct),
            lambda: [*correct],
        )


_Answers = Mapping[str, Sequence[Correctness]]
"""Which videos a row's models get right: fold -> one for each seed."""


@dataclass(frozen=True)
class Comparison:
    """One row's top-1 minus another's, over the videos that both were tested on."""

    difference: float
    """Percentage points."""
    low: float
    high: float
    """The 95 % interval over other videos, and over other seeds if a row has several."""
    p: float
    """Two-sided: McNemar's exact test with one seed each, else a t test over seeds and videos.
    ``compare`` does not correct it for several comparisons, ``holm_corrected`` does."""
    num_videos: int
    num_seeds: int = 1
    """Trainings of the row that has fewer."""

    @property
    def is_significant(self) -> bool:
        """Whether the two rows differ significantly, at 5 %."""
        return self.p < 1 - CONFIDENCE


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


def compare(ours: Sequence[Correctness], theirs: Sequence[Correctness]) -> Comparison | None:
    """Compare two rows, each given by its seeds; none if no video is in all of them.

    With one training each, McNemar's exact test over the videos decides whether these two models
    differ. With several, a t test over seeds and videos decides whether the settings differ (see
    :func:`_variance`).
    """
    one, other = (np.array(row, dtype=float) for row in _over_the_same(ours, theirs))
    num_videos = one.shape[1]
    if not num_videos:
        return None
    # For each video, the difference of the rows' shares of seeds that classify it correctly.
    gaps = one.mean(axis=0) - other.mean(axis=0)
    difference = float(gaps.mean())
    variance, freedom = _variance(one, other)
    reach = _student(freedom).ppf((1 + CONFIDENCE) / 2) * variance**0.5
    num_seeds = min(len(ours), len(theirs))
    if len(ours) == len(theirs) == 1:
        p = mcnemar(int((gaps > 0).sum()), int((gaps < 0).sum()))
    elif variance > 0:
        p = float(2 * _student(freedom).sf(abs(difference) / variance**0.5))
    # No variance at all: t would be a division by zero.
    else:
        p = 1.0 if difference == 0 else 0.0
    # From shares to percentage points.
    low = 100 * (difference - reach)
    high = 100 * (difference + reach)
    return Comparison(100 * difference, low, high, p, num_videos, num_seeds)


def compare_over_folds(
    ours: Mapping[str, Sequence[Correctness]], theirs: Mapping[str, Sequence[Correctness]]
) -> Comparison | None:
    """Compare two rows that are means over folds; none with fewer than two folds in both.

    A paired t test over the folds' accuracies. Two folds train on mostly the same videos, so their
    differences vary less than those of independent data would. The variance is corrected for it,
    with the ratio of test to training videos of folds that share out the data (Nadeau and Bengio,
    Inference for the generalization error, 2003).
    """
    folds = [fold for fold in ours if fold in theirs]
    count = len(folds)
    if count < 2:
        return None
    gaps = np.array([_accuracy(ours[fold]) - _accuracy(theirs[fold]) for fold in folds])
    difference = float(gaps.mean())
    # In k folds, each tests on a share 1 / k of the videos, and trains on the others.
    deviation = float((gaps.var(ddof=1) * (1 / count + 1 / (count - 1))) ** 0.5)
    student = _student(count - 1)
    if deviation > 0:
        p = float(2 * student.sf(abs(difference) / deviation))
    else:
        p = 1.0 if difference == 0 else 0.0
    reach = student.ppf((1 + CONFIDENCE) / 2) * deviation
    num_videos = sum(len(ours[fold][0].correct) for fold in folds)
    low = 100 * (difference - reach)
    high = 100 * (difference + reach)
    # Each fold is a training of its own.
    return Comparison(100 * difference, low, high, p, num_videos, count)


def _accuracy(seeds: Sequence[Correctness]) -> float:
    """Return the mean accuracy of a fold's models, a share."""
    return float(np.mean([each.correct.mean() for each in seeds]))


def _compare_rows(ours: _Answers, theirs: _Answers) -> Comparison | None:
    """Compare two rows: over the videos, or over the folds of which they are means."""
    if {*ours, *theirs} == {_NO_FOLD}:
        return compare(ours[_NO_FOLD], theirs[_NO_FOLD])
    return compare_over_folds(ours, theirs)


def _variance(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the variance of the difference of two rows' means, and its degrees of freedom.

    ``one`` and ``other`` have the shape seeds × videos.

    Seeds and videos are crossed random factors. The variance between seeds and the variance between
    videos are added. Both contain the variance of single videos under single seeds, so that part is
    subtracted once. The first has few degrees of freedom (the rows' variances are pooled), the
    second many. The degrees are combined as in Satterthwaite's formula, but the ratio of the
    variances is not squared: with two seeds the estimated spread is often too small by chance, and
    the formula then trusts it too much (7 % false positives at two seeds,
    ``benchmarks/false_positives.py``).
    """
    num_videos = one.shape[1]
    gaps = one.mean(axis=0) - other.mean(axis=0)
    if num_videos > 1:
        between_videos = float(gaps.var(ddof=1)) / num_videos
    else:
        between_videos = 0.0
    # With one seed each, nothing is known about the variance between seeds.
    few = len(one) + len(other) - 2
    if few == 0:
        return between_videos, max(num_videos - 1.0, 1.0)
    shares = 1 / len(one) + 1 / len(other)
    deviations = [*(one.mean(axis=1) - one.mean()), *(other.mean(axis=1) - other.mean())]
    between_seeds = shares * float(np.square(deviations).sum()) / few
    # The part that is in both variances: how single videos vary between the seeds of a row.
    within = sum(float(np.square(row - row.mean(axis=0)).sum()) for row in (one, other))
    of_both = shares * within / few / num_videos**2
    # An estimate by subtraction may come out too small, even negative.
    variance = max(between_seeds + between_videos - of_both, between_seeds, between_videos)
    if variance <= 0:
        return 0.0, float(few)
    # Seeds of equal accuracy have no variance: the small share avoids a division by zero.
    return variance, max(float(few), few * variance / max(between_seeds, 1e-12 * variance))


def _student(freedom: float) -> Any:
    """Return Student's t distribution; from a million degrees on it is the normal distribution."""
    # Imported here because scipy takes long to import and ``mar plan`` does not need it.
    from scipy import stats

    # Its quantiles no longer change there.
    return stats.t(min(freedom, 1e6))


def _over_the_same(
    ours: Sequence[Correctness], theirs: Sequence[Correctness]
) -> tuple[list[npt.NDArray[np.bool_]], list[npt.NDArray[np.bool_]]]:
    """Return each run's correctness on the videos that all runs have, in the same order."""
    # The usual case: nobody has to read the names of all videos.
    if len({each.videos_digest for each in (*ours, *theirs)}) == 1:
        return [each.correct for each in ours], [each.correct for each in theirs]
    named = [
        [dict(zip(each.names(), each.correct, strict=True)) for each in row]
        for row in (ours, theirs)
    ]
    videos = sorted(set.intersection(*(set(each) for row in named for each in row)))
    one, other = (
        [np.array([each[video] for video in videos], dtype=bool) for each in row] for row in named
    )
    return one, other


def mcnemar(only_one: int, only_other: int) -> float:
    """Return the p value of McNemar's exact test.

    The arguments count the videos that only the first and only the second model classifies
    correctly.
    """
    # Imported here because scipy takes long to import and ``mar plan`` does not need it.
    from scipy import stats

    # Without such videos the models agree on everything, and binomtest needs at least one trial.
    if only_one + only_other:
        return float(stats.binomtest(only_one, only_one + only_other).pvalue)
    return 1.0


def holm_corrected(comparisons: Mapping[str, Comparison | None]) -> dict[str, Comparison | None]:
    """Return the comparisons with Holm's correction of p for the number of comparisons."""
    present = sorted((each.p, name) for name, each in comparisons.items() if each is not None)
    result = dict(comparisons)
    highest = 0.0
    for rank, (p, name) in enumerate(present):
        # A corrected p is never below that of a comparison with a smaller p (Holm's step-down).
        highest = max(highest, min(1.0, (len(present) - rank) * p))
        each = comparisons[name]
        assert each is not None
        result[name] = replace(each, p=highest)
    return result


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
        row: _compare_rows(correct, rows[reference])
        for row, correct in rows.items()
        if row != reference
    }
    return {row: gap for row, gap in holm_corrected(gaps).items() if gap is not None}


def tells_apart(results: StudyResults, row: str, other: str) -> bool:
    """Whether the videos tell two rows' top-1 apart, at 5 %; not where one has no predictions."""
    rows = _correctness_of_rows(results, {row, other})
    if row not in rows or other not in rows:
        return False
    comparison = _compare_rows(rows[row], rows[other])
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


def _judged(text: str, pairs: Sequence[str], rows: Mapping[str, _Answers]) -> Claim:
    """Return a claim with its verdict.

    Supported: every pair differs significantly, in the paper's direction. Contradicted: at least
    one pair differs significantly in the other direction. Missing: a run is missing. Else open.
    """
    gaps: dict[str, Comparison | None] = {}
    for pair in pairs:
        better, worse = pair.split(" > ")
        if better in rows and worse in rows:
            gaps[pair] = _compare_rows(rows[better], rows[worse])
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


def _correctness_of_rows(
    results: StudyResults, only: set[str] | None = None
) -> dict[str, _Answers]:
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
        return read[run.run_id]

    correct: dict[str, _Answers] = {}
    for row, trials in grouped.items():
        if any(trial.key not in found for trial in trials):
            continue
        folds: dict[str, list[Correctness]] = {}
        try:
            for trial in trials:
                fold = _NO_FOLD
                if trial.averaged_axis is not None:
                    fold = trial.labels[trial.averaged_axis]
                folds.setdefault(fold, []).append(answers_of(trial))
        except (Failure, OSError) as error:
            mention_lost_file(error)
        else:
            correct[row] = folds
    return correct
