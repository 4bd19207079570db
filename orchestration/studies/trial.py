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
"""The fingerprint of data that is missing."""


@dataclass(frozen=True)
class Trial:
    """One training of a study: its place in the table, and its complete settings."""

    # Identity and key are computed when they are first read and then kept: a study may have
    # thousands of trials, and each is matched many times.
    labels: Mapping[str, str]
    """Axis -> label."""
    settings: TrainingConfig
    fingerprint: str
    """The fingerprint of the data's content; ``ABSENT`` if the data is missing."""
    averaged_axis: str | None = None
    """The axis whose labels share a row of the table (``TableLayout.mean_over``)."""

    @property
    def row(self) -> str:
        """The labels of the row that it is in, joined."""
        return BETWEEN_LABELS.join(
            label for axis, label in self.labels.items() if axis != self.averaged_axis
        )

    @property
    def name(self) -> str:
        """The trial's name for people: the labels of all axes, and its seed."""
        return f"{BETWEEN_LABELS.join(self.labels.values())} (seed {self.settings.seed})"

    @cached_property
    def identity(self) -> str:
        """One line of text that is the same for trials with equal results.

        It has all settings, with the data's fingerprint instead of its paths.
        """
        return identity(self.settings, self.fingerprint)

    @cached_property
    def training(self) -> str:
        """One line of text that is the same for trials with equal models.

        Trials that differ in ``evaluation`` alone are one training.
        """
        return training_identity(self.identity)

    @property
    def lacks_weights(self) -> bool:
        """Whether it starts from pre-trained weights that are not on this machine."""
        # The fingerprint of missing weights begins with ``WEIGHTS_ABSENT``, then has their name.
        name = self.settings.encoder.weights
        return name is not None and weights_fingerprint(name).startswith(WEIGHTS_ABSENT)

    @cached_property
    def key(self) -> str:
        """A short hash of the identity; the name of the trial's folder."""
        return key_of(self.identity)


@dataclass(frozen=True)
class Study:
    """A study, resolved."""

    name: str
    """The experiment's name in MLflow: at first the file's name without its ending."""
    file: StudyFile
    trials: Sequence[Trial]
    path: Path | None = None
    """The study's file; none for a search, whose trials are proposed by Optuna."""
    chosen: frozenset[str] | None = None
    """Names of the trials that this launch runs (``--filter``); none: all. Not their keys, which
    depend on weights that may have to be downloaded first."""
    overrides: tuple[str, ...] = ()
    """The settings of the command line that replaced the file's, each as ``path=value``."""

    @property
    def to_run(self) -> list[Trial]:
        """The trials that this launch runs."""
        # ``trials`` keeps the others, because the study's table shows all of them.
        return [trial for trial in self.trials if self.chosen is None or trial.name in self.chosen]

    @property
    def trains(self) -> bool:
        """Whether the study trains models; a figure of masks needs none."""
        return self.file.figure.kind != "masks"
