"""A study, resolved: an ordered list of trials, each with labels and complete settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mar.config.schema import TrainingConfig
from mar.weights.hub import ABSENT as WEIGHTS_ABSENT
from orchestration.studies.identity import identity, key_of, training_identity, weights_fingerprint
from orchestration.studies.schema import BETWEEN_LABELS, StudyFile

ABSENT = "absent"
"""The fingerprint while the data is not there."""


@dataclass(frozen=True)
class Trial:
    """One training of a study: its place in the table, and its complete settings."""

    labels: Mapping[str, str]
    """Axis -> label."""
    settings: TrainingConfig
    fingerprint: str
    """Of the data's content; ``ABSENT`` while it is not there."""

    @property
    def row(self) -> str:
        """The labels of all axes, joined."""
        return BETWEEN_LABELS.join(self.labels.values())

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.row} (seed {self.settings.seed})"

    @cached_property
    def identity(self) -> str:
        """Equal identities, equal results.

        All settings, with the data's fingerprint in place of its paths.
        """
        return identity(self.settings, self.fingerprint)

    @cached_property
    def training(self) -> str:
        """Equal trainings, equal models.

        Trials that differ in ``evaluation`` alone are one training.
        """
        return training_identity(self.identity)

    @property
    def lacks_weights(self) -> bool:
        """Whether it starts from pre-trained weights that are not on this machine."""
        name = self.settings.encoder.weights
        return name is not None and weights_fingerprint(name).startswith(WEIGHTS_ABSENT)

    @cached_property
    def key(self) -> str:
        """A short hash of the identity; names the trial's folder."""
        return key_of(self.identity)


@dataclass(frozen=True)
class Study:
    """A study, resolved."""

    name: str
    """The file's name without its ending: the experiment's name in MLflow."""
    file: StudyFile
    trials: Sequence[Trial]
    path: Path | None = None
    """The study's file; none for one that was made by a program."""
    chosen: frozenset[str] | None = None
    """Keys of the trials that are to run now (``--filter``); none: all."""

    @property
    def to_run(self) -> list[Trial]:
        """The trials that are to run now."""
        return [trial for trial in self.trials if self.chosen is None or trial.key in self.chosen]

    @property
    def trains(self) -> bool:
        """Whether there is anything to train: pictures of masks need no model."""
        return self.file.figure.kind != "masks"
