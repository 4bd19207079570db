"""The order in which the missing trials of a launch run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from mar.model.flops import cost
from orchestration.studies.trial import Study, Trial

Order = Literal["file", "shared", "cheapest"]
"""``file``: the study's own. ``shared``: what most studies share first, of equal ones the cheapest.
``cheapest``: the cheapest first."""


def uses(studies: Iterable[Study]) -> Counter[str]:
    """Count in how many studies each training is needed."""
    counts: Counter[str] = Counter()
    for study in studies:
        counts.update({trial.training for trial in study.trials})
    return counts


def in_order(
    trials: Sequence[Trial],
    order: Order,
    num_studies: Counter[str],
    price: Callable[[Trial], float] | None = None,
) -> list[Trial]:
    """Return trials in an order; equal ones stay as they were.

    Args:
        trials: What is to run.
        order: Which order.
        num_studies: In how many studies each training is needed (:func:`uses`).
        price: The cost of a trial; by default its training's operations over all epochs, for which
            the number of videos need not be known.
    """
    price = price or _operations
    if order == "cheapest":
        return sorted(trials, key=price)
    if order == "shared":
        return sorted(trials, key=lambda trial: (-num_studies[trial.training], price(trial)))
    return list(trials)


def _operations(trial: Trial) -> float:
    return cost(trial.settings).train_gflops * trial.settings.recipe.epochs
