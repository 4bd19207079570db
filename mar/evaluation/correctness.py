"""Small files of a result: which test videos were classified correctly, and the epochs' metrics.

They are small, so that tables and tests can read thousands of results. Imports no torch.
"""

from __future__ import annotations

import csv
import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from mar.errors import Failure

CORRECTNESS = "correctness.npz"
"""File of a result. For 20,000 videos it has two kilobytes, where their predictions have two
megabytes."""


def videos_digest(names: Iterable[str]) -> str:
    """Return a digest of the videos' names in their order.

    Models with the same digest were tested on the same videos, so their results can be paired.
    """
    # Python keeps bytes of a file name that are not UTF-8 as surrogates, which encode() refuses.
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def write_correctness(correct: npt.NDArray[np.bool_], names: Iterable[str], file: Path) -> None:
    """Write which of the named videos were classified correctly, one bit for each."""
    # An open file, because np.savez adds ".npz" to a path without that ending. packbits fills up
    # the last byte, so the number of videos is stored too.
    with file.open("wb") as output:
        np.savez(
            output,
            videos_digest=np.array(videos_digest(names)),
            correct=np.packbits(correct),
            num_videos=np.array(len(correct)),
        )


def read_correctness(file: Path) -> tuple[npt.NDArray[np.bool_], str]:
    """Return which videos were classified correctly, and the digest of their names.

    Raises:
        FileNotFoundError: there is no such file.
        Failure: it is damaged.
    """
    try:
        with np.load(file) as stored:
            num_videos = int(stored["num_videos"])
            correct = np.unpackbits(stored["correct"], count=num_videos).astype(bool)
            return correct, str(stored["videos_digest"])
    # numpy raises each of these for some damage of the zip file or of the arrays in it.
    except (ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise Failure(f"{file}: damaged ({error})") from None


def read_history(result: Path) -> list[dict[str, float]]:
    """Return the metrics of each epoch of a result; empty for a result that was only tested."""
    file = result / "history.csv"
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    # A cell is empty where an epoch has no such metric, for example no validation.
    return [
        {name: float(value) for name, value in row.items() if value and name != "epoch"}
        for row in rows
    ]
