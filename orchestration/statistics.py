"""What the test videos can tell: paired comparisons of rows, from each run's stored predictions.

Two models that are tested on the same videos are compared video by video: most gaps between ablations are smaller than
the standard error of either accuracy (0.32 points at 71 % of 20,000 videos), and only the pairing can see them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mar import answers
from mar.errors import Failure
from orchestration.results import CONFIDENCE, AnyRecord, match
from orchestration.study import Study, Trial

FileOf = Callable[[AnyRecord, str], Path]
"""(run, name) -> that file of its result folder."""
ONE_TRAINING = "One training a row: what another seed would change is not in the interval."
Verdict = Literal["supported", "contradicted", "open", "not there yet"]
_RESAMPLES = 2000
_FEW_VIDEOS = 5000
"""Fewer are drawn again one by one; the mean over more is normal to all digits that are printed."""


@dataclass(frozen=True)
class Answers:
    """Which test videos a model got right."""

    right: npt.NDArray[np.bool_]
    listing: str
    """Digest of the videos' names in their order (``mar.answers.listing``)."""
    names: Callable[[], list[str]]
    """Reads them; asked only when two models were not tested on the same ones."""

    @classmethod
    def of(cls, correct: Mapping[str, bool]) -> Answers:
        """Return the answers that a mapping of names gives."""
        return cls(np.array([*correct.values()], dtype=bool), answers.listing(correct), lambda: [*correct])


@dataclass(frozen=True)
class Comparison:
    """One row's top-1 less another's, over the videos that both were tested on."""

    difference: float
    """Points of percent."""
    low: float
    high: float
    """95 % interval: paired bootstrap over videos, and over seeds where there are several."""
    p: float
    """McNemar's exact test with one seed each, else from the bootstrap; two-sided, not yet corrected."""
    num_videos: int

    @property
    def is_told(self) -> bool:
        """Whether the videos tell the two apart, at 5 %."""
        return self.p < 1 - CONFIDENCE


@dataclass(frozen=True)
class Claim:
    """What the paper concludes, and what our runs say of it."""

    words: str
    verdict: Verdict
    pairs: Mapping[str, Comparison | None]
    """``better > worse`` -> better less worse (corrected over the claim's pairs); none: not there yet."""


def read_answers(run: AnyRecord, file_of: FileOf[AnyRecord]) -> Answers:
    """Return a run's answers; of one that an earlier version tested, from its predictions."""

    def correct() -> dict[str, bool]:
        with file_of(run, "predictions.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
            return {line["video"]: line["label"] == line["class_1"] for line in csv.DictReader(lines)}

    try:
        right, listing = answers.read_answers(file_of(run, answers.ANSWERS))
    except (Failure, FileNotFoundError):
        return Answers.of(correct())
    return Answers(right, listing, lambda: [*correct()])


def compare(ours: Sequence[Answers], theirs: Sequence[Answers]) -> Comparison | None:
    """Compare two rows, each given by its seeds; none: no video is in all of them."""
    one, other = (np.array(row, dtype=float) for row in _over_the_same(ours, theirs))
    videos = one[0]
    if not len(videos):
        return None
    gaps = 100 * (one.mean(axis=0) - other.mean(axis=0))
    drawn = _bootstrap(100 * one, 100 * other)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if len(ours) == len(theirs) == 1:
        p = mcnemar(int((gaps > 0).sum()), int((gaps < 0).sum()))
    else:
        beyond = min((drawn <= 0).mean(), (drawn >= 0).mean())
        p = min(1.0, 2 * max(float(beyond), 1 / _RESAMPLES))
    return Comparison(float(gaps.mean()), float(low), float(high), p, len(videos))


def _over_the_same(
    ours: Sequence[Answers], theirs: Sequence[Answers]
) -> tuple[list[npt.NDArray[np.bool_]], list[npt.NDArray[np.bool_]]]:
    """Return the answers on the videos that all have, in one order."""
    if len({each.listing for each in (*ours, *theirs)}) == 1:
        return [each.right for each in ours], [each.right for each in theirs]
    named = [[dict(zip(each.names(), each.right, strict=True)) for each in row] for row in (ours, theirs)]
    videos = sorted(set.intersection(*(set(each) for row in named for each in row)))
    one, other = ([np.array([each[video] for video in videos], dtype=bool) for each in row] for row in named)
    return one, other


def mcnemar(only_one: int, only_other: int) -> float:
    """Return the p of McNemar's exact test, from the videos that one model alone gets right."""
    from scipy import stats  # slow to import, and a plan needs none

    return float(stats.binomtest(only_one, only_one + only_other).pvalue) if only_one + only_other else 1.0


def _bootstrap(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return resampled differences of the means; arrays are seeds × videos."""
    rng, num_videos = np.random.default_rng(0), one.shape[1]
    if len(one) == len(other) == 1:  # few values: how often each is drawn is multinomial
        values, counts = np.unique(one[0] - other[0], return_counts=True)
        return rng.multinomial(num_videos, counts / num_videos, _RESAMPLES) @ values / num_videos
    shares = np.concatenate([_seeds(len(one), rng), -_seeds(len(other), rng)], axis=1)  # resamples × all seeds
    both = np.concatenate([one, other])
    if num_videos < _FEW_VIDEOS:
        chosen = rng.integers(num_videos, size=(_RESAMPLES, num_videos))
        return np.array([share @ both[:, videos].mean(axis=1) for share, videos in zip(shares, chosen, strict=True)])
    covariance = np.cov(both, bias=True)
    deviation = np.sqrt(np.einsum("rs,st,rt->r", shares, covariance, shares) / num_videos)
    return shares @ both.mean(axis=1) + deviation * rng.standard_normal(_RESAMPLES)


def _seeds(count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw as many seeds again: the share of each in a row's mean, by resample.

    Few of them vary too little by (n - 1) / n, which is made good around their mean.
    """
    drawn = rng.multinomial(count, np.full(count, 1 / count), _RESAMPLES) / count
    widening = (count / (count - 1)) ** 0.5 if count > 1 else 1.0
    return 1 / count + widening * (drawn - 1 / count)


def corrected(comparisons: Mapping[str, Comparison | None]) -> dict[str, Comparison | None]:
    """Return the comparisons with Holm's correction for their number."""
    there = sorted((each.p, name) for name, each in comparisons.items() if each is not None)
    result, highest = dict(comparisons), 0.0
    for place, (p, name) in enumerate(there):
        highest = max(highest, min(1.0, (len(there) - place) * p))
        each = comparisons[name]
        assert each is not None
        result[name] = replace(each, p=highest)
    return result


def against_reference(study: Study, records: Sequence[AnyRecord], file_of: FileOf[AnyRecord]) -> dict[str, Comparison]:
    """Return, by row, each finished row less the table's reference row, corrected for the number of rows."""
    reference, rows = study.file.table.reference, _right_answers(study, records, file_of)
    if reference not in rows:
        return {}
    gaps = {row: compare(right, rows[reference]) for row, right in rows.items() if row != reference}
    return {row: gap for row, gap in corrected(gaps).items() if gap is not None}


def claims(study: Study, records: Sequence[AnyRecord], file_of: FileOf[AnyRecord]) -> list[Claim]:
    """Return the verdict of our runs on each of the study's claims."""
    rows = _right_answers(study, records, file_of) if study.file.claims else {}
    return [_judged(words, pairs, rows) for words, pairs in study.file.claims.items()]


def _judged(words: str, pairs: Sequence[str], rows: Mapping[str, Sequence[Answers]]) -> Claim:
    gaps: dict[str, Comparison | None] = {}
    for pair in pairs:
        better, worse = pair.split(" > ")
        gaps[pair] = compare(rows[better], rows[worse]) if better in rows and worse in rows else None
    gaps = corrected(gaps)
    told = [gap for gap in gaps.values() if gap is not None and gap.is_told]
    if any(gap.difference < 0 for gap in told):
        return Claim(words, "contradicted", gaps)
    if None in gaps.values():
        return Claim(words, "not there yet", gaps)
    return Claim(words, "supported" if len(told) == len(gaps) else "open", gaps)


def _right_answers(study: Study, records: Sequence[AnyRecord], file_of: FileOf[AnyRecord]) -> dict[str, list[Answers]]:
    """Return, by row with all its seeds, which videos each seed's model gets right."""
    found = match(study.trials, records)
    grouped: dict[str, list[Trial]] = {}
    for trial in study.trials:
        grouped.setdefault(trial.row, []).append(trial)
    read: dict[str, Answers] = {}

    def answers_of(trial: Trial) -> Answers:
        run = found[trial.key]
        if run.run_id not in read:
            read[run.run_id] = read_answers(run, file_of)
        return read[run.run_id]

    whole = {row: trials for row, trials in grouped.items() if all(trial.key in found for trial in trials)}
    return {row: [answers_of(trial) for trial in trials] for row, trials in whole.items()}
