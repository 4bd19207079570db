"""Paired tests of two rows, and the differences that they find.

Two models that are tested on the same videos are compared video by video. Most differences between
ablations are smaller than the standard error of either accuracy (0.32 points at 71 % of 20,000
videos), so only a paired test can detect them. Rows that are means over folds are compared fold by
fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mar.evaluation import correctness
from orchestration.reporting.rows import CONFIDENCE

NO_FOLD = ""
"""The fold of a row that is not a mean over folds."""


@dataclass(frozen=True)
class Correctness:
    """Which test videos a model classified correctly."""

    correct: npt.NDArray[np.bool_]
    videos_digest: str
    """Digest of the videos' names in their order
    (``mar.evaluation.correctness.videos_digest``)."""
    names: Callable[[], list[str]]
    """Reads the videos' names; called only when two models were tested on different videos."""
    training: str = ""
    """Identity of the training whose model this is; empty where it is not known."""

    @classmethod
    def of(cls, correct: Mapping[str, bool]) -> Correctness:
        """Return the correctness from a mapping of each video's name to whether it was right."""
        return cls(
            np.array([*correct.values()], dtype=bool),
            correctness.videos_digest(correct),
            lambda: [*correct],
        )


Answers = Mapping[str, Sequence[Correctness]]
"""Which videos a row's models get right: fold -> one for each seed."""


@dataclass(frozen=True)
class Comparison:
    """One row's top-1 minus another's, over the videos that both were tested on, or over folds."""

    difference: float
    """Percentage points."""
    low: float
    high: float
    """The 95 % interval over other videos, and over other seeds if a row has several; or over other
    folds."""
    p: float
    """Two-sided: McNemar's exact test with one seed each, else a t test over seeds and videos, or
    over folds. ``compare_rows`` does not correct it for several comparisons; ``holm_corrected``
    does."""
    num_videos: int
    num_seeds: int = 1
    """Trainings of the row that has fewer; or the number of folds."""

    @property
    def is_significant(self) -> bool:
        """Whether the two rows differ significantly, at 5 %."""
        return self.p < 1 - CONFIDENCE


def compare_rows(ours: Answers, theirs: Answers) -> Comparison | None:
    """Compare two rows: over the videos, or over the folds of which they are means."""
    if {*ours, *theirs} == {NO_FOLD}:
        return compare(ours[NO_FOLD], theirs[NO_FOLD])
    return compare_over_folds(ours, theirs)


def compare(ours: Sequence[Correctness], theirs: Sequence[Correctness]) -> Comparison | None:
    """Compare two rows, each given by its seeds; none if no video is in all of them.

    With one training each, McNemar's exact test over the videos decides whether these two models
    differ. With several, a t test over seeds and videos decides whether the settings differ (see
    :func:`_variance`). Rows that test the same trainings in two ways are compared training by
    training: how much one differs from another is in both rows, and cancels.
    """
    one, other = (np.array(row, dtype=float) for row in _over_the_same(ours, theirs))
    num_videos = one.shape[1]
    if not num_videos:
        return None
    # For each video, the difference of the rows' shares of seeds that classify it correctly.
    gaps = one.mean(axis=0) - other.mean(axis=0)
    difference = float(gaps.mean())
    if _are_of_the_same_trainings(ours, theirs):
        variance, freedom = _variance([one - other])
    else:
        variance, freedom = _variance([one, other])
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


def compare_over_folds(ours: Answers, theirs: Answers) -> Comparison | None:
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


def _are_of_the_same_trainings(ours: Sequence[Correctness], theirs: Sequence[Correctness]) -> bool:
    """Whether two rows test the same trainings, in the same order."""
    trainings = [each.training for each in ours]
    return all(trainings) and trainings == [each.training for each in theirs]


def _variance(rows: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """Return the variance of the difference of two rows' means, and its degrees of freedom.

    ``rows`` are the two, each seeds × videos; or, where both are tests of the same trainings, one:
    their difference.

    Seeds and videos are crossed random factors. The variance between seeds and the variance between
    videos are added. Both contain the variance of single videos under single seeds, so that part is
    subtracted once. The first has few degrees of freedom (the rows' variances are pooled), the
    second many. The degrees are combined as in Satterthwaite's formula, but the ratio of the
    variances is not squared: with two seeds the estimated spread is often too small by chance, and
    the formula then trusts it too much (7 % false positives at two seeds,
    ``benchmarks/false_positives.py``).
    """
    num_videos = rows[0].shape[1]
    gaps = rows[0].mean(axis=0)
    if len(rows) > 1:
        gaps = gaps - rows[1].mean(axis=0)
    if num_videos > 1:
        between_videos = float(gaps.var(ddof=1)) / num_videos
    else:
        between_videos = 0.0
    # With one seed each, nothing is known about the variance between seeds.
    few = sum(len(row) - 1 for row in rows)
    if few == 0:
        return between_videos, max(num_videos - 1.0, 1.0)
    shares = sum(1 / len(row) for row in rows)
    deviations = np.concatenate([row.mean(axis=1) - row.mean() for row in rows])
    between_seeds = shares * float(np.square(deviations).sum()) / few
    # The part that is in both variances: how single videos vary between the seeds of a row.
    within = sum(float(np.square(row - row.mean(axis=0)).sum()) for row in rows)
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
