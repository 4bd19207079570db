"""The budget of a launch: the device-hours that it may spend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mar.errors import UserError
from orchestration.studies.devices import Device
from orchestration.studies.matching import Record, match_training
from orchestration.studies.plan import plan_trials
from orchestration.studies.trial import Study, Trial


@dataclass
class Budget:
    """Device-hours that may be spent; ``take`` subtracts those of the trials that it returns."""

    # Studies of one launch share this object, and so the hours.
    hours: float
    device: Device | None
    """The profile by which hours are estimated; none: the throughput of finished trials."""

    def take(
        self, study: Study, missing: Sequence[Trial], records: Sequence[Record]
    ) -> list[Trial]:
        """Return the missing trials that fit into the hours, in their order.

        A trial that is only tested, with another's model, costs nothing here.

        Raises:
            UserError: the hours of a trial cannot be estimated.
        """
        planned = {line.trial.key: line for line in plan_trials(study, records, self.device)}
        chosen: list[Trial] = []
        paid = match_training(missing, records).keys()
        for trial in missing:
            line = planned[trial.key]
            if line.device_hours is None:
                raise UserError(
                    "--budget: the device-hours cannot be estimated: they need the data, and a "
                    "finished trial of the study or --device (v100, h200, NAME=GFLOPS_PER_S)"
                )
            # The first of the trials with one training pays for it, the others test its model.
            is_paid = trial.key in paid or any(trial.training == other.training for other in chosen)
            hours = 0.0 if is_paid else line.device_hours
            # A trial that is too long is left out, and a shorter one after it may still fit.
            if hours <= self.hours:
                self.hours -= hours
                chosen.append(trial)
        return chosen
