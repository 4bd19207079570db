"""Masked Action Recognition: the science. Knows torch; knows nothing of Ray, MLflow or Optuna."""

__version__ = "0.1.0"

RESULT = "result"
"""Folder, below a trial's, of the finished model, its settings, metrics and predictions."""
MANIFEST = "manifest.json"
"""Written last into a result or checkpoint folder, with the SHA-256 of its files."""
