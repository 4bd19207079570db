"""The names of our tags in MLflow. They are stored: a change makes older runs unreadable."""

from __future__ import annotations

# The prefix keeps our tags apart from those of users and from MLflow's own ("mlflow.…").
KIND = "mar.kind"
"""``study`` or ``trial``."""
STUDY = "mar.study"
TITLE = "mar.title"
EXPECTED = "mar.expected"
"""Of a study: its number of trials, finished or not, at its last launch."""
RUNS = "mar.runs"
"""Of a study: the runs in its table, also those of other studies; JSON."""

KEY = "mar.key"
"""Of a trial: the short hash of its identity, the name of its folder."""
IDENTITY = "mar.identity"
"""Of a trial: its settings and the fingerprints of data and weights, on one line. Trials with equal
identities have equal results."""
LABELS = "mar.labels"
"""Of a trial: its label on each axis of its study; JSON."""
SEED = "mar.seed"
FOLDER = "mar.folder"
"""Of a trial: its folder, on the machine that ran it."""
WEIGHTS = "mar.weights"
"""Of a trial: the name of the pre-trained weights it started from."""
TRAINED_BY = "mar.trained_by"
"""Of a trial that was tested, not trained: the key of the trial whose model it used."""
MODEL_LOST = "mar.model_lost"
"""Of a trial that was trained, and whose result came here without its model."""
COST_GFLOPS = "mar.cost.gflops"
COST_PARAMS_M = "mar.cost.params_m"
DATA_PREFIX = "mar.data."
"""Before the name of a setting that is a path. Paths are not part of the identity."""
MICROBATCH_CLIPS = "mar.microbatch_clips"
"""Of a trial that ran out of memory: the micro-batch, in clips, that it was trained with."""
PRUNED = "mar.pruned"
FAILURE = "mar.failure"
"""Of a failed trial: the message."""
FAILURE_KIND = "mar.failure_kind"

# The one name without our prefix.
PARENT_RUN = "mlflow.parentRunId"
"""MLflow's own tag: it shows a trial's run below its study's."""
