"""What reading thousands of results needs of each: which test videos were right, a bit each.

Its epochs. Imports no torch.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

CORRECTNESS = "correctness.npz"
"""File of a result: two kilobytes where the predictions of the same 20,000 videos are two
megabytes."""


def videos_digest(names: Iterable[str]) -> str:
    """Return a digest of the videos' names in their order.

    Models with the same digest were tested on the same videos.
    """
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def write_correctness(correct: npt.NDArray[np.bool_], names: Iterable[str], file: Path) -> None:
    """Write which of the named videos were right."""
    with file.open("wb") as output:
        np.savez(
            output,
            videos_digest=np.array(videos_digest(names)),
            correct=np.packbits(correct),
            num_videos=np.array(len(correct)),
        )


def read_correctness(file: Path) -> tuple[npt.NDArray[np.bool_], str]:
    """Return which videos were right, and the digest of their names."""
    with np.load(file) as stored:
        return np.unpackbits(stored["correct"], count=int(stored["num_videos"])).astype(bool), str(
            stored["videos_digest"]
        )


def read_history(result: Path) -> list[dict[str, float]]:
    """Return the metrics of each epoch that a result has; none for one that was tested only."""
    file = result / "history.csv"
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return [
        {name: float(value) for name, value in row.items() if value and name != "epoch"}
        for row in rows
    ]
