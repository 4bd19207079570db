"""What the test videos can tell: paired comparisons of rows, from each run's stored predictions.

Two models that are tested on the same videos are compared video by video: most gaps between
ablations are smaller than the standard error of either accuracy (0.32 points at 71 % of 20,000
videos), and only the pairing can see them.
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
"""Behind the verdict of a claim some of whose rows have one training: another seed might say
another thing."""
ONE_TRAINING = "One training a row: what another seed would change is not in the interval."
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
    """Which test videos a model got right."""

    correct: npt.NDArray[np.bool_]
    videos_digest: str
    """Digest of the videos' names in their order (``mar.answers.listing``)."""
    names: Callable[[], list[str]]
    """Reads them; asked only when two models were not tested on the same ones."""

    @classmethod
    def of(cls, correct: Mapping[str, bool]) -> Correctness:
        """Return the answers that a mapping of names gives."""
        return cls(
            np.array([*correct.values()], dtype=bool),
            correctness.videos_digest(correct),
            lambda: [*correct],
        )


@dataclass(frozen=True)
class Comparison:
    """One row's top-1 less another's, over the videos that both were tested on."""

    difference: float
    """Points of percent."""
    low: float
    high: float
    """95 % interval, over other videos, and over other seeds where there are several."""
    p: float
    """Two-sided: McNemar's exact test with one seed each, else a t test over seeds and videos; not
    yet corrected."""
    num_videos: int
    num_seeds: int = 1
    """Trainings of the row that has fewer."""

    @property
    def is_significant(self) -> bool:
        """Whether the videos tell the two apart, at 5 %."""
        return self.p < 1 - CONFIDENCE


@dataclass(frozen=True)
class Claim:
    """What the paper concludes, and what our runs say of it."""

    text: str
    verdict: Verdict
    pairs: Mapping[str, Comparison | None]
    """``better > worse`` -> better less worse (corrected over the claim's pairs); none: not there
    yet."""


def read_correctness(run: Record, file_of: FileOf) -> Correctness:
    """Return a run's answers; of one that an earlier version tested, from its predictions."""

    def from_predictions() -> dict[str, bool]:
        with file_of(run, "predictions.csv").open(
            newline="", encoding="utf-8", errors="surrogateescape"
        ) as lines:
            return {
                line["video"]: line["label"] == line["class_1"] for line in csv.DictReader(lines)
            }

    try:
        correct, videos_digest = correctness.read_correctness(file_of(run, correctness.CORRECTNESS))
    except (Failure, FileNotFoundError):
        return Correctness.of(from_predictions())
    return Correctness(correct, videos_digest, lambda: [*from_predictions()])


def compare(ours: Sequence[Correctness], theirs: Sequence[Correctness]) -> Comparison | None:
    """Compare two rows, each given by its seeds; none: no video is in all of them.

    With one training each the question is whether these two models differ: McNemar's exact test
    over the videos. With several it is whether the settings differ, over other seeds and other
    videos: a t test, see :func:`_variance`.
    """
    one, other = (np.array(row, dtype=float) for row in _over_the_same(ours, theirs))
    num_videos = one.shape[1]
    if not num_videos:
        return None
    gaps = one.mean(axis=0) - other.mean(axis=0)
    difference = float(gaps.mean())
    variance, freedom = _variance(one, other)
    reach = _student(freedom).ppf((1 + CONFIDENCE) / 2) * variance**0.5
    num_seeds = min(len(ours), len(theirs))
    if len(ours) == len(theirs) == 1:
        p = mcnemar(int((gaps > 0).sum()), int((gaps < 0).sum()))
    elif variance > 0:
        p = float(2 * _student(freedom).sf(abs(difference) / variance**0.5))
    else:
        p = 1.0 if difference == 0 else 0.0
    low = 100 * (difference - reach)
    high = 100 * (difference + reach)
    return Comparison(100 * difference, low, high, p, num_videos, num_seeds)


def _variance(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the variance of the difference of two rows' means, and its degrees of freedom.

    Arrays are seeds × videos.

    Seeds and videos are crossed and both are drawn: the variance between seeds and the variance
    between videos add up, less what is in both, the part that belongs to a seed on a video. The
    first has few degrees of freedom (the rows' variances are pooled), the second many. They are
    combined as in Satterthwaite's formula, but with the ratio of the variances as it is and not
    squared: what two seeds say of the spread is often too small by chance, and the formula then
    trusts it too much (7 % false positives at two seeds, ``benchmarks/false_positives.py``).
    """
    num_videos = one.shape[1]
    gaps = one.mean(axis=0) - other.mean(axis=0)
    if num_videos > 1:
        between_videos = float(gaps.var(ddof=1)) / num_videos
    else:
        between_videos = 0.0
    few = len(one) + len(other) - 2
    if few == 0:
        return between_videos, max(num_videos - 1.0, 1.0)
    shares = 1 / len(one) + 1 / len(other)
    deviations = [*(one.mean(axis=1) - one.mean()), *(other.mean(axis=1) - other.mean())]
    between_seeds = shares * float(np.square(deviations).sum()) / few
    within = sum(float(np.square(row - row.mean(axis=0)).sum()) for row in (one, other))
    of_both = shares * within / few / num_videos**2
    variance = max(between_seeds + between_videos - of_both, between_seeds, between_videos)
    if variance <= 0:
        return 0.0, float(few)
    return variance, max(float(few), few * variance / max(between_seeds, 1e-12 * variance))


def _student(freedom: float) -> Any:
    """Return Student's distribution, beyond a million degrees the normal one."""
    from scipy import stats  # slow to import, and a plan needs none

    return stats.t(min(freedom, 1e6))


def _over_the_same(
    ours: Sequence[Correctness], theirs: Sequence[Correctness]
) -> tuple[list[npt.NDArray[np.bool_]], list[npt.NDArray[np.bool_]]]:
    """Return the answers on the videos that all have, in one order."""
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
    """Return the p of McNemar's exact test, from the videos that one model alone gets right."""
    from scipy import stats  # slow to import, and a plan needs none

    if only_one + only_other:
        return float(stats.binomtest(only_one, only_one + only_other).pvalue)
    return 1.0


def holm_corrected(comparisons: Mapping[str, Comparison | None]) -> dict[str, Comparison | None]:
    """Return the comparisons with Holm's correction for their number."""
    there = sorted((each.p, name) for name, each in comparisons.items() if each is not None)
    result = dict(comparisons)
    highest = 0.0
    for rank, (p, name) in enumerate(there):
        highest = max(highest, min(1.0, (len(there) - rank) * p))
        each = comparisons[name]
        assert each is not None
        result[name] = replace(each, p=highest)
    return result


def against_reference(results: StudyResults) -> dict[str, Comparison]:
    """Return each finished row's difference from the table's reference row.

    Corrected for the number of rows.
    """
    reference = results.study.file.table.reference
    if reference is None:
        return {}
    rows = _correctness_of_rows(results)
    if reference not in rows:
        return {}
    gaps = {
        row: compare(correct, rows[reference]) for row, correct in rows.items() if row != reference
    }
    return {row: gap for row, gap in holm_corrected(gaps).items() if gap is not None}


def tells_apart(results: StudyResults, row: str, other: str) -> bool:
    """Whether the videos tell two rows' top-1 apart, at 5 %; not where one has no predictions."""
    rows = _correctness_of_rows(results, {row, other})
    if row not in rows or other not in rows:
        return False
    comparison = compare(rows[row], rows[other])
    return comparison is not None and comparison.is_significant


def are_apart(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether seeds tell two means of a measured quantity apart, at 5 % (Welch's t test).

    One seed tells nothing.
    """
    from scipy import stats  # slow to import, and a plan needs none

    if min(len(ours), len(theirs)) < 2:
        return False
    if len({*ours}) == len({*theirs}) == 1:  # no spread at all
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


def _judged(text: str, pairs: Sequence[str], rows: Mapping[str, Sequence[Correctness]]) -> Claim:
    gaps: dict[str, Comparison | None] = {}
    for pair in pairs:
        better, worse = pair.split(" > ")
        if better in rows and worse in rows:
            gaps[pair] = compare(rows[better], rows[worse])
        else:
            gaps[pair] = None
    gaps = holm_corrected(gaps)
    there = [gap for gap in gaps.values() if gap is not None]
    significant = [gap for gap in there if gap.is_significant]
    is_one_training = any(gap.num_seeds == 1 for gap in there)
    verdict: Verdict = "open"
    if is_one_training:
        verdict = "open in one training"
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
) -> dict[str, list[Correctness]]:
    """Return, by row with all its seeds, which videos each seed's model classifies correctly.

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

    def answers_of(trial: Trial) -> Correctness:
        run = found[trial.key]
        if run.run_id not in read:
            read[run.run_id] = read_correctness(run, file_of)
        return read[run.run_id]

    correct: dict[str, list[Correctness]] = {}
    for row, trials in grouped.items():
        if any(trial.key not in found for trial in trials):
            continue
        try:
            correct[row] = [answers_of(trial) for trial in trials]
        except (Failure, OSError) as error:
            mention_lost_file(error)
    return correct
