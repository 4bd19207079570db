"""Which test videos a model got right, a bit each: what comparing thousands of runs reads. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

ANSWERS = "answers.npz"
"""File of a result: two kilobytes where the predictions of the same 20,000 videos are two megabytes."""


def listing(names: Iterable[str]) -> str:
    """Return a digest of videos' names in their order: models with the same one were tested on the same videos."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def write_answers(right: npt.NDArray[np.bool_], names: Iterable[str], file: Path) -> None:
    """Write which of the named videos were right."""
    with file.open("wb") as output:
        np.savez(output, listing=np.array(listing(names)), right=np.packbits(right), num_videos=np.array(len(right)))


def read_answers(file: Path) -> tuple[npt.NDArray[np.bool_], str]:
    """Return which videos were right, and the digest of their names."""
    with np.load(file) as stored:
        return np.unpackbits(stored["right"], count=int(stored["num_videos"])).astype(bool), str(stored["listing"])
