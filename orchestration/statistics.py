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

from orchestration.results import CONFIDENCE, AnyRecord, match
from orchestration.study import Study, Trial

FileOf = Callable[[AnyRecord, str], Path]
"""(run, name) -> that file of its result folder."""
Correct = Mapping[str, bool]
"""Video -> whether its most probable class is its label."""
ONE_TRAINING = "One training a row: what another seed would change is not in the interval."
Verdict = Literal["supported", "contradicted", "open", "not there yet"]
_RESAMPLES = 2000


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


def read_correct(file: Path) -> dict[str, bool]:
    """Return, from a ``predictions.csv``, which videos were right."""
    with file.open(newline="", encoding="utf-8") as lines:
        return {line["video"]: line["label"] == line["class_1"] for line in csv.DictReader(lines)}


def compare(ours: Sequence[Correct], theirs: Sequence[Correct]) -> Comparison | None:
    """Compare two rows, each given by its seeds; none: no video is in all of them."""
    videos = sorted(set.intersection(*(set(each) for each in (*ours, *theirs))))
    if not videos:
        return None
    one, other = (np.array([[seed[video] for video in videos] for seed in row], dtype=float) for row in (ours, theirs))
    gaps = 100 * (one.mean(axis=0) - other.mean(axis=0))
    drawn = _bootstrap(100 * one, 100 * other)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if len(ours) == len(theirs) == 1:
        p = mcnemar(int((gaps > 0).sum()), int((gaps < 0).sum()))
    else:
        beyond = min((drawn <= 0).mean(), (drawn >= 0).mean())
        p = min(1.0, 2 * max(float(beyond), 1 / _RESAMPLES))
    return Comparison(float(gaps.mean()), float(low), float(high), p, len(videos))


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
    drawn = np.empty(_RESAMPLES)
    for number in range(_RESAMPLES):
        gaps = _seeds(one, rng).mean(axis=0) - _seeds(other, rng).mean(axis=0)
        drawn[number] = gaps[rng.integers(num_videos, size=num_videos)].mean()
    return drawn


def _seeds(row: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw as many seeds again; few of them vary too little by (n - 1) / n, which is made good around their mean."""
    drawn, mean = row[rng.integers(len(row), size=len(row))], row.mean(axis=0)
    widening = (len(row) / (len(row) - 1)) ** 0.5 if len(row) > 1 else 1.0
    return mean + widening * (drawn - mean)


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


def _judged(words: str, pairs: Sequence[str], rows: Mapping[str, Sequence[Correct]]) -> Claim:
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


def _right_answers(
    study: Study, records: Sequence[AnyRecord], file_of: FileOf[AnyRecord]
) -> dict[str, list[dict[str, bool]]]:
    """Return, by row with all its seeds, which videos each seed's model gets right."""
    found = match(study.trials, records)
    grouped: dict[str, list[Trial]] = {}
    for trial in study.trials:
        grouped.setdefault(trial.row, []).append(trial)
    read: dict[str, dict[str, bool]] = {}

    def answers(trial: Trial) -> dict[str, bool]:
        run = found[trial.key]
        if run.run_id not in read:
            read[run.run_id] = read_correct(file_of(run, "predictions.csv"))
        return read[run.run_id]

    whole = {row: trials for row, trials in grouped.items() if all(trial.key in found for trial in trials)}
    return {row: [answers(trial) for trial in trials] for row, trials in whole.items()}
