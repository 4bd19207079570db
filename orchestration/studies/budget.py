"""The budget of a launch: the device-hours that it may spend."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mar.errors import UserError
from orchestration.studies.devices import Device
from orchestration.studies.matching import Record, match_training
from orchestration.studies.order import Order, in_order, uses
from orchestration.studies.plan import Planned, PlannedTrial, plan_trials
from orchestration.studies.trial import Study, Trial


@dataclass
class Budget:
    """Device-hours that may be spent; ``take`` subtracts those of the trials that it returns."""

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
        earlier = Planned()
        missing: dict[str, Trial] = {}
        hours: dict[str, float] = {}
        for study in studies:
            for line in plan_trials(study, records, self.device, earlier):
                if line.state == "have" or line.trial.key in missing:
                    continue
                missing[line.trial.key] = line.trial
                hours[line.trial.key] = _known_hours(line)
        is_free = match_training(list(missing.values()), records).keys()
        ordered = in_order(
            list(missing.values()), order, uses(studies), lambda trial: hours[trial.key]
        )
        chosen: list[Trial] = []
        for trial in ordered:
            self._take_if_it_fits(trial, hours[trial.key], is_free, chosen)
        self.chosen = frozenset(trial.key for trial in chosen)
        return self._completeness(studies, missing)

    def _completeness(self, studies: Sequence[Study], missing: Mapping[str, Trial]) -> str:
        """Return a line for the studies that will be complete, and one for each other."""
        assert self.chosen is not None
        complete: list[str] = []
        partial: list[str] = []
        for study in studies:
            keys = {trial.key for trial in study.trials} if study.trains else set()
            left = (keys & missing.keys()) - self.chosen
            if left:
                partial.append(f"{study.name} ({len(keys) - len(left)} of {len(keys)})")
            else:
                complete.append(study.name)
        return (
            f"complete with this budget: {', '.join(complete) or 'none'}\n"
            f"incomplete: {', '.join(partial) or 'none'}; {self.hours:.1f} device-hours are left"
        )

    def _take_if_it_fits(
        self, trial: Trial, hours: float, is_free: Collection[str], chosen: list[Trial]
    ) -> None:
        # The first of the trials with one training pays for it, the others test its model.
        is_paid = trial.key in is_free or any(trial.training == other.training for other in chosen)
        if is_paid:
            hours = 0.0
        # A trial that is too long is left out, and a shorter one after it may still fit.
        if hours <= self.hours:
            self.hours -= hours
            chosen.append(trial)

    def take(
        self, study: Study, missing: Sequence[Trial], records: Sequence[Record]
    ) -> list[Trial]:
        """Return the missing trials that fit into the hours, in their order.

        A trial that is only tested, with another's model, costs nothing here.

        Raises:
            UserError: the hours of a trial cannot be estimated.
        """
        if self.chosen is not None:
            return [trial for trial in missing if trial.key in self.chosen]
        planned = {line.trial.key: line for line in plan_trials(study, records, self.device)}
        chosen: list[Trial] = []
        paid = match_training(missing, records).keys()
        for trial in missing:
            self._take_if_it_fits(trial, _known_hours(planned[trial.key]), paid, chosen)
        return chosen


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
