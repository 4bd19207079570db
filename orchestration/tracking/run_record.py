"""A trial's run as it is stored in MLflow, without MLflow's types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestration.tracking.tags import IDENTITY, KEY, MODEL_LOST, TRAINED_BY, WEIGHTS


@dataclass(frozen=True)
class RunRecord:
    """A trial's run as it is stored in MLflow; a ``studies.matching.Record``."""

    # ``studies`` and ``search`` match runs and must not import MLflow: this class is what they see.

    run_id: str
    experiment: str
    experiment_id: str
    status: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def identity(self) -> str:
        """The trial's identity (``studies.identity``); empty for a run without one."""
        return self.tags.get(IDENTITY, "")

    @property
    def key(self) -> str:
        """The trial's key: its folder's name."""
        return self.tags.get(KEY, "")

    @property
    def was_trained(self) -> bool:
        """Whether it was trained, not only tested."""
        # A trial that was only tested names the trial whose model it used.
        return TRAINED_BY not in self.tags

    @property
    def has_model(self) -> bool:
        """Whether its result has a model: it was trained, and not recovered without one."""
        return self.was_trained and MODEL_LOST not in self.tags

    @property
    def weights(self) -> str | None:
        """The name of the pre-trained weights it started from, if any."""
        return self.tags.get(WEIGHTS)
