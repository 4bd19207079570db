"""Which videos a split has and what they are labelled: plain lists and Something-Something's json files."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mar.config import DataConfig
from mar.errors import UserError

Split = Literal["train", "val"]
_FINGERPRINTED_FILES = 1000
"""Video sizes that go into a fingerprint, spread evenly over the split: enough to notice another encoding."""


@dataclass(frozen=True)
class Video:
    """One labelled video."""

    name: str
    """Its path below the video folder, as the annotations give it."""
    path: Path
    label: int


def read_split(data: DataConfig, split: Split) -> list[Video]:
    """Return the labelled videos of a split, in the order of the annotation file.

    Raises:
        UserError: a missing file, a line that cannot be understood, an unknown class, or a path that
            leaves the data root. The message names file and line.
    """
    root = Path(data.root)
    if not root.is_dir() or not any(root.iterdir()):
        state = "is empty" if root.is_dir() else "does not exist"
        raise UserError(f"data.root: the folder {root} {state}; put the data set there or set data.root")
    file = _annotation_file(data, split)
    rows = _read_ssv2(data, file) if data.format == "ssv2" else _read_list(file)
    if not rows:
        raise UserError(f"{file}: no videos in it; data.{split} must name at least one")
    folder = root / data.videos
    return [Video(name, _below(folder, name, place), _checked(label, data, place)) for name, label, place in rows]


def fingerprint(data: DataConfig) -> str:
    """Return a hash of both splits' names and labels and of their videos' sizes; equal content, equal hash.

    It stands for ``data.root`` and the annotation files' paths in a trial's identity.
    """
    digest = hashlib.sha256()
    for split in ("train", "val"):
        videos = read_split(data, split)
        digest.update("".join(f"{split}\t{video.name}\t{video.label}\n" for video in videos).encode())
        for video in videos[:: max(1, len(videos) // _FINGERPRINTED_FILES)]:
            size = video.path.stat().st_size if video.path.is_file() else -1
            digest.update(f"{video.name}\t{size}\n".encode())
    return digest.hexdigest()[:16]


def _annotation_file(data: DataConfig, split: Split) -> Path:
    file = Path(data.root) / getattr(data, split)
    if not file.is_file():
        raise UserError(f"data.{split}: no annotation file {file}")
    return file


def _read_list(file: Path) -> list[tuple[str, int, str]]:
    """One video a line: a path and a class number, parted by a comma or white space; the path may hold spaces."""
    rows: list[tuple[str, int, str]] = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        text, place = line.strip(), f"{file}:{number}"
        if not text:
            continue
        parts = next(csv.reader([text])) if "," in text else text.rsplit(maxsplit=1)
        name, label = (parts[0].strip(), parts[-1].strip()) if len(parts) == 2 else ("", "")
        if not name or not label.isdecimal():
            raise UserError(f"{place}: expected a path and a class number, as in 'clips/a.mp4 3', not {text!r}")
        rows.append((name, int(label), place))
    return rows


def _read_ssv2(data: DataConfig, file: Path) -> list[tuple[str, int, str]]:
    """Something-Something v2: a list of {"id", "template", …}; the class is the template without brackets."""
    labels = _labels(data)
    rows: list[tuple[str, int, str]] = []
    for number, item in enumerate(_read_json(file, list), start=1):
        place = f"{file}: item {number}"
        if not isinstance(item, dict) or not {"id", "template"} <= item.keys():
            raise UserError(f"{place}: expected an object with 'id' and 'template', not {json.dumps(item)[:80]}")
        entry: dict[str, Any] = item
        template = str(entry["template"]).replace("[", "").replace("]", "")
        if template not in labels:
            raise UserError(f"{place}: the class {template!r} is not in {Path(data.root) / data.labels}")
        rows.append((_ssv2_file(Path(data.root) / data.videos, str(entry["id"])), labels[template], place))
    return rows


def _ssv2_file(folder: Path, identifier: str) -> str:
    """The official release is webm; many train on a conversion to mp4."""
    original = f"{identifier}.webm"
    return original if (folder / original).exists() else f"{identifier}.mp4"


def _labels(data: DataConfig) -> dict[str, int]:
    file = Path(data.root) / data.labels
    if not file.is_file():
        raise UserError(f"data.labels: no file {file}")
    labels = _read_json(file, dict)
    try:
        return {str(name): int(label) for name, label in labels.items()}
    except (TypeError, ValueError):
        raise UserError(f"{file}: every class name must have a number") from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _read_json(file: Path, kind: type[Any]) -> Any:
    try:
        content = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(content, kind):
        raise UserError(f"{file}: expected a JSON {'list' if kind is list else 'object'}")
    return content


def _below(folder: Path, name: str, place: str) -> Path:
    path = folder / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{place}: {name} leaves the video folder {folder}; paths must stay below it")
    return path


def _checked(label: int, data: DataConfig, place: str) -> int:
    if not 0 <= label < data.num_classes:
        raise UserError(f"{place}: class {label} is outside 0 … {data.num_classes - 1} (data.num_classes)")
    return label
