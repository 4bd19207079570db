"""Masked Action Recognition, for Python.

>>> import mar
>>> mar.load("mini").predict("clip.mp4")
>>> mar.Study.read("quickstart").run(backend="inline").table()

``mar`` is the science: its modules import torch, but not Ray, MLflow or Optuna. The experiment is
``orchestration``, which imports ``mar``. A user should not have to know which of the two has a
name, so this module, and it alone, offers names of both.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mar.errors import Failure as Failure
    from mar.errors import UserError as UserError
    from mar.inference import Model as Model
    from orchestration.api import Results as Results
    from orchestration.api import Study as Study
    from orchestration.api import load as load
    from orchestration.api import results as results

_HOME = {
    "Failure": "mar.errors",
    "Model": "mar.inference",
    "Results": "orchestration.api",
    "Study": "orchestration.api",
    "UserError": "mar.errors",
    "load": "orchestration.api",
    "results": "orchestration.api",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    So ``import mar`` loads nothing: the command line and planning do without torch.
    """
    if name not in _HOME:
        raise AttributeError(f"module 'mar' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


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
