"""Device-hours that may be spent on a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mar.errors import UserError
from orchestration.studies.matching import Record, match_training
from orchestration.studies.plan import Device, plan_trials
from orchestration.studies.trial import Study, Trial


@dataclass
class Budget:
    """Device-hours that may be spent, by a device's profile; what is spent is taken off."""

    hours: float
    device: Device | None
    """None: by the throughput of finished trials."""

    def take(
        self, study: Study, missing: Sequence[Trial], records: Sequence[Record]
    ) -> list[Trial]:
        """Return the missing trials that fit, in order.

        A test of another's model costs next to nothing.
        """
        planned = {line.trial.key: line for line in plan_trials(study, records, self.device)}
        chosen: list[Trial] = []
        paid = match_training(missing, records).keys()
        for trial in missing:
            line = planned[trial.key]
            if line.device_hours is None:
                raise UserError(
                    "--budget: nothing tells the hours: is the data there, and is a trial of the "
                    "study finished here? "
                    "Or give --device (v100, h200, NAME=GFLOPS_PER_S)"
                )
            is_paid = trial.key in paid or any(trial.training == other.training for other in chosen)
            hours = 0.0 if is_paid else line.device_hours
            if hours <= self.hours:
                self.hours -= hours
                chosen.append(trial)
        return chosen
