"""Masked Action Recognition: the science. Imports torch, but not Ray, MLflow or Optuna."""

# Only constants are defined here, so that ``import mar`` loads nothing else: the command line and
# planning import submodules that do without torch.

__version__ = "0.1.0"

RESULTS_VERSION = 5
"""Part of a trial's identity, raised when equal settings begin to give other results.

Runs that have no version are of version 1.

2: the bridging classifier's projection and the linear head start as in the release and in VideoMAE.
3: HEVC, MPEG-4 part 2, MPEG-2, ts and wmv videos give the requested frames; a broken video keeps
   its position in the batch.
4: H.264 with open groups or intra refresh, files with edit lists and VP8 with hidden frames give
   the requested frames.
5: the test with shuffled frames draws from its own random stream.
"""
RESULT_DIR = "result"
"""Subfolder of a trial's folder: the finished model, its settings, metrics and predictions."""
MANIFEST = "manifest.json"
"""Written last into a result or checkpoint folder, with the SHA-256 of its files."""
