"""Which missing trials of a launch run: their order, and the device-hours that they may take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mar.errors import UserError
from mar.model.flops import cost
from orchestration.studies.devices import Device
from orchestration.studies.matching import Record, match_training
from orchestration.studies.plan import Planned, PlannedTrial, plan_trials
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


@dataclass
class _Prices:
    """What the missing trials of some studies cost."""

    missing: dict[str, Trial] = field(default_factory=dict[str, Trial])
    """Key -> trial, each once, in the studies' order."""
    hours: dict[str, float] = field(default_factory=dict[str, float])
    """Training's identity -> device-hours of a trial with it, training and test."""
    trained: set[str] = field(default_factory=set[str])
    """Identities of trainings that are finished: their trials are only tested."""

    def of(self, trial: Trial) -> float:
        """Return the hours of a trial: any of those with one training may be the first to run."""
        return 0.0 if trial.training in self.trained else self.hours[trial.training]


@dataclass
class Budget:
    """Device-hours that may be spent; ``take`` subtracts those of the trials that it returns.

    The first trial that is taken with a training pays for it; the others only test its model, which
    costs nothing here. A training that could continue a shorter one is priced as if it could not,
    unless the shorter one is finished: the shorter one may not be taken.
    """

    # Studies of one launch share this object, and so the hours.
    hours: float
    device: Device | None
    """The profile by which hours are estimated; none: the throughput of finished trials."""
    chosen: frozenset[str] | None = None
    """Keys of the trials that ``choose`` took, of several studies; none: it was not called."""

    def choose(self, studies: Sequence[Study], records: Sequence[Record], order: Order) -> str:
        """Take the trials of several studies in one order; returns which of these are complete.

        Raises:
            UserError: the hours of a trial cannot be estimated.
        """
        prices = self._prices(studies, records)
        missing = list(prices.missing.values())
        taken = self._taken(in_order(missing, order, uses(studies), prices.of), prices)
        self.chosen = frozenset(trial.key for trial in taken)
        complete: list[str] = []
        partial: list[str] = []
        for study in studies:
            keys = {trial.key for trial in study.to_run} if study.trains else set[str]()
            left = (keys & prices.missing.keys()) - self.chosen
            if left:
                partial.append(f"{study.name} ({len(keys) - len(left)} of {len(keys)})")
            else:
                complete.append(study.name)
        return (
            f"complete with this budget: {', '.join(complete) or 'none'}\n"
            f"incomplete: {', '.join(partial) or 'none'}; {self.hours:.1f} device-hours are left"
        )

    def take(
        self, study: Study, missing: Sequence[Trial], records: Sequence[Record]
    ) -> list[Trial]:
        """Return the missing trials that fit into the hours, in their order.

        Raises:
            UserError: the hours of a trial cannot be estimated.
        """
        if self.chosen is not None:
            return [trial for trial in missing if trial.key in self.chosen]
        return self._taken(missing, self._prices([study], records))

    def _prices(self, studies: Sequence[Study], records: Sequence[Record]) -> _Prices:
        prices = _Prices()
        earlier = Planned()
        for study in studies:
            part = replace(study, trials=study.to_run)
            lines = plan_trials(part, records, self.device, earlier, continues_planned=False)
            for line in lines:
                if line.state != "have":
                    prices.missing.setdefault(line.trial.key, line.trial)
                # The lines after it with the same training are priced at their test alone.
                if line.state == "new":
                    prices.hours.setdefault(line.trial.training, _known_hours(line))
        trained = match_training(list(prices.missing.values()), records)
        for trial in prices.missing.values():
            if trial.key in trained or trial.training not in prices.hours:
                prices.trained.add(trial.training)
        return prices

    def _taken(self, trials: Sequence[Trial], prices: _Prices) -> list[Trial]:
        """Return those of some trials that fit, and subtract their hours."""
        taken: list[Trial] = []
        for trial in trials:
            hours = prices.of(trial)
            # A trial that is too long is left out, and a shorter one after it may still fit.
            if hours <= self.hours:
                self.hours -= hours
                prices.trained.add(trial.training)
                taken.append(trial)
        return taken


def _known_hours(line: PlannedTrial) -> float:
    """Return the hours of a planned trial.

    Raises:
        UserError: they cannot be estimated.
    """
    if line.device_hours is None:
        raise UserError(
            "--budget: the device-hours cannot be estimated: they need the data, and a "
            "finished trial of the study or --device (v100, h200, NAME=GFLOPS_PER_S)"
        )
    return line.device_hours
