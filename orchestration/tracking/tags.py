"""The names of our tags in MLflow. They are stored: a change makes older runs unreadable."""

from __future__ import annotations

IDENTITY, KEY, KIND, STUDY = "mar.identity", "mar.key", "mar.kind", "mar.study"


PARENT_RUN = "mlflow.parentRunId"
"""MLflow's tag by which a trial's run is below its study's."""


EXPECTED = "mar.expected"
"""Of a study: how many trials it has or is to have, those of other studies not counted."""


WEIGHTS = "encoder.weights"


TRAINED_BY = "mar.trained_by"
"""Of a trial that was tested, not trained: the key of the trial whose model it is."""
