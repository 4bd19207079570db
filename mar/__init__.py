"""Masked Action Recognition: the science. Knows torch; knows nothing of Ray, MLflow or Optuna."""

__version__ = "0.1.0"

RESULTS_VERSION = 5
"""Part of a trial's identity, raised when equal settings begin to give other results.

Runs without one are of version 1.

2: the bridging classifier's projection and the linear head start as in the release and in VideoMAE.
3: HEVC, MPEG-4 part 2, MPEG-2, ts and wmv videos give the frames asked for; a broken video keeps
   its position in the batch.
4: H.264 with open groups or intra refresh, files with edit lists and VP8 with hidden frames give
   the frames asked for.
5: the test with shuffled frames draws from a stream of its own.
"""
RESULT_DIR = "result"
"""Folder, below a trial's, of the finished model, its settings, metrics and predictions."""
MANIFEST = "manifest.json"
"""Written last into a result or checkpoint folder, with the SHA-256 of its files."""
