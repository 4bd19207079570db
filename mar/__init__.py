"""Masked Action Recognition: the science. Knows torch; knows nothing of Ray, MLflow or Optuna."""

__version__ = "0.1.0"
