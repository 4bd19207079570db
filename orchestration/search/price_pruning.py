"""Prunes a search with several objectives: what a trial costs is known before it begins.

A trial is compared with the trials that cost no more than it, at the same epoch. If it is worse
than a quantile of these, it would not be on the front at its price or below, and ends. So a dear
trial must be better than the cheap ones, and a cheap one need not be as good as the dear ones,
which a pruner without prices would ask of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_COMPARED_FROM_EPOCH = 2
"""Epochs are counted from 1: the first is still in warm-up."""
_FEWEST_OTHERS = 4
"""Trials that a trial is compared with at least: of fewer, a quantile says little."""


@dataclass(frozen=True)
class Curve:
    """The validation accuracy of a trial by epoch, and what it costs."""

    prices: Sequence[float]
    """Its value of each objective that is a cost, known from its settings; less is better."""
    accuracies: Mapping[int, float]


def is_behind(curve: Curve, epoch: int, others: Sequence[Curve], quantile: float) -> bool:
    """Whether a trial is, at this epoch, below a quantile of those that cost no more.

    Args:
        curve: The trial's own.
        epoch: Compared is the accuracy after it.
        others: All other trials of the search, running and pruned ones included.
        quantile: 0.5 is the median; 0.25 ends fewer trials.
    """
    if epoch < _COMPARED_FROM_EPOCH:
        return False
    reached = [
        other.accuracies[epoch]
        for other in others
        if epoch in other.accuracies and _costs_no_more(other, curve)
    ]
    if len(reached) < _FEWEST_OTHERS:
        return False
    # The value that this share of the others is below, without interpolation: a trial equal to the
    # median one goes on.
    reached.sort()
    threshold = reached[math.ceil(quantile * len(reached)) - 1]
    return curve.accuracies[epoch] < threshold


def _costs_no_more(one: Curve, other: Curve) -> bool:
    return all(mine <= theirs for mine, theirs in zip(one.prices, other.prices, strict=True))
