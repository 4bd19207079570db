"""Shared parts of the annotation readers: rows, the official file names, reading text.

The readers themselves are in ``mar.data.annotation_formats`` and ``mar.data.official_formats``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mar.config.input_settings import DataConfig
from mar.errors import UserError

Split = Literal["train", "val"]
# A release may lie in the data root itself, or in the sub-folder of its archive.
_OFFICIAL: dict[str, dict[str, tuple[str, ...]]] = {
    "list": {"train": ("train.txt", "train.csv"), "val": ("val.txt", "val.csv", "test.csv")},
    "folders": {"train": ("train",), "val": ("val", "validation", "test")},
    "ssv2": {
        "train": ("labels/train.json", "something-something-v2-train.json", "train.json"),
        "val": (
            "labels/validation.json",
            "something-something-v2-validation.json",
            "validation.json",
        ),
        "labels": ("labels/labels.json", "something-something-v2-labels.json", "labels.json"),
    },
    "kinetics": {
        "train": ("train.csv", "annotations/train.csv", "kinetics400/train.csv"),
        "val": ("val.csv", "validate.csv", "annotations/val.csv", "kinetics400/validate.csv"),
    },
    "ucf101": {
        "train": ("trainlist{split:02d}.txt", "ucfTrainTestlist/trainlist{split:02d}.txt"),
        "val": ("testlist{split:02d}.txt", "ucfTrainTestlist/testlist{split:02d}.txt"),
        "labels": ("classInd.txt", "ucfTrainTestlist/classInd.txt"),
    },
    "diving48": {
        "train": ("Diving48_V2_train.json", "Diving48_train.json"),
        "val": ("Diving48_V2_test.json", "Diving48_test.json"),
        "labels": ("Diving48_vocab.json",),
    },
    "jester": {
        "train": ("jester-v1-train.csv", "annotations/jester-v1-train.csv"),
        "val": ("jester-v1-validation.csv", "annotations/jester-v1-validation.csv"),
        "labels": ("jester-v1-labels.csv", "annotations/jester-v1-labels.csv"),
    },
    "hmdb51": {
        "train": ("testTrainMulti_7030_splits", "splits", "."),
        "val": ("testTrainMulti_7030_splits", "splits", "."),
    },
}
"""Format -> kind of file -> its names in the official release; the first that exists is used."""


@dataclass(frozen=True)
class Row:
    """One line of an annotation file."""

    name: str
    """The video's path below the video folder."""
    label: int
    location: str
    """The annotation file and the line or item, for error messages."""


@dataclass(frozen=True)
class Annotations:
    """The annotations of one split."""

    rows: list[Row]
    classes: list[str] | None = None
    """Class names by number; None where the format has only numbers."""


def annotation_file(data: DataConfig, what: Literal["train", "val", "labels"]) -> Path:
    """Return the file that ``data`` names, or else the first official name that exists.

    Raises:
        UserError: no such file exists.
    """
    root = Path(data.root)
    given = getattr(data, what)
    # A file that the user names is never replaced by an official one.
    if given:
        names = [given]
    else:
        names = [
            name.format(split=data.split) for name in _OFFICIAL.get(data.format, {}).get(what, ())
        ]
    # exists() and not is_file(): HMDB51 has a folder of lists, and "folders" one of class folders.
    found = next((root / name for name in names if (root / name).exists()), None)
    if found is None:
        raise UserError(
            f"data.{what}: no annotation file {' or '.join(str(root / name) for name in names)} "
            "(its path is relative to data.root)"
        )
    return found


def named_classes(data: DataConfig) -> list[str]:
    """Return the class names in ``data.labels``, one per line, the first for class 0."""
    lines = read_text(annotation_file(data, "labels")).splitlines()
    # A blank line must not count, or it would shift the numbers of all classes after it.
    return [line.strip().strip('"') for line in lines if line.strip()]


def read_text(file: Path) -> str:
    """Return the text of a file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    # "utf-8-sig" also drops the byte order mark that editors on Windows write.
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
