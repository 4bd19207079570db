"""Annotation files as they are distributed.

Lists, Something-Something v2, Kinetics-400, UCF101, HMDB51 and folders.

Each reader returns rows: a video's path below the video folder, its class number, and where that
was said. Official files name videos without saying where, or under which ending, they lie: those
are looked up in the folder.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mar.config.schema import DataConfig
from mar.data.video_files import VideoFolder, absolute_path, is_hidden, videos_below
from mar.errors import UserError, notice
from mar.safe_input import parse_json

Split = Literal["train", "val"]
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
    "hmdb51": {
        "train": ("testTrainMulti_7030_splits", "splits", "."),
        "val": ("testTrainMulti_7030_splits", "splits", "."),
    },
}
"""Format -> what -> the names under which the official release has it, first found first taken."""


@dataclass(frozen=True)
class Row:
    """One line of an annotation file."""

    name: str
    """Path below the video folder."""
    label: int
    location: str
    """File and line."""


@dataclass(frozen=True)
class Annotations:
    """One split as annotated."""

    rows: list[Row]
    classes: list[str] | None = None
    """Class names by number; none where the format has only numbers."""


def read_annotations(data: DataConfig, split: Split) -> Annotations:
    """Return what the annotation files say of a split.

    Raises:
        UserError: a missing file, or a line that cannot be understood; the message names file and
            line.
    """
    return _READERS[data.format](data, split)


def annotation_file(data: DataConfig, what: Literal["train", "val", "labels"]) -> Path:
    """Return the file that ``data`` names, or the first of the official names that is there.

    Raises:
        UserError: there is none.
    """
    root = Path(data.root)
    given = getattr(data, what)
    if given:
        names = [given]
    else:
        names = [name.format(split=data.split) for name in _OFFICIAL[data.format].get(what, ())]
    found = next((root / name for name in names if (root / name).exists()), None)
    if found is None:
        raise UserError(
            f"data.{what}: no annotation file {' or '.join(str(root / name) for name in names)}"
        )
    return found


_NUMBER = re.compile("[0-9]{1,9}")
"""Of a class or a second; Python reads none of thousands of digits."""
_LONGEST_LINE = 10_000
"""Characters; a path has at most 4,096, and to match a line of blanks takes the square of its
length."""
_LINE = re.compile(
    r"""
    (?: "(?P<quoted> (?: [^"] | "" )+ )" | (?P<plain> [^"] .*? ) )   # a path, quoted or not
    [\s,;|]+
    "? (?P<label> [0-9]{1,9} ) "?                                       # a class number
    """,
    re.VERBOSE,
)


def _read_list(data: DataConfig, split: Split) -> Annotations:
    """Read a list: a path and a class number on each line.

    White space, a comma, a semicolon or a bar separates them.

    The path may hold spaces, and may stand in double quotes, as pandas and spreadsheets write it.
    With ``data.labels`` the classes have names, one a line.
    """
    file = annotation_file(data, split)
    folder = Path(data.root) / data.videos
    rows: list[Row] = []
    for number, line in enumerate(_list_text(file).splitlines(), start=1):
        text = line.strip()
        location = f"{file}:{number}"
        if not text:
            continue
        if len(text) <= _LONGEST_LINE:
            found = _LINE.fullmatch(text)
        else:
            found = None
        if not found:
            raise UserError(
                f"{location}: expected a path and a class number, as in 'clips/a.mp4 3', not "
                f"{text!r}"
            )
        quoted = found["quoted"]
        name = quoted.replace('""', '"') if quoted else found["plain"]
        if (
            not name.isprintable()
            and "\udc80" <= max(name) <= "\udcff"
            and not (folder / name).exists()
        ):
            raise UserError(
                f"{location}: {name!r} is not UTF-8 text, and no such file is there; save the "
                "list as UTF-8"
            )
        if "\\" in name and not (folder / name).exists():
            raise UserError(
                f"{location}: {name!r} has Windows' backslashes; write / between folders"
            )
        rows.append(Row(name, int(found["label"]), location))
    return Annotations(rows, _named_classes(data) if data.labels else None)


def _list_text(file: Path) -> str:
    """Return a list's text.

    A file system may have names that are not UTF-8, and Python has a way to keep them.
    """
    try:
        return file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None


def _named_classes(data: DataConfig) -> list[str]:
    """Return the class names of ``data.labels``, one a line, the first of class 0."""
    lines = _text(annotation_file(data, "labels")).splitlines()
    return [line.strip().strip('"') for line in lines if line.strip()]


def _read_ssv2(data: DataConfig, split: Split) -> Annotations:
    """Something-Something v2: a list of {"id", "template", …}.

    The class is the template without brackets.

    The lists that the MAR release describes have a number, ``label_idx``, in each item; then no
    labels file is needed.
    """
    file = annotation_file(data, split)
    folder = VideoFolder(data)
    items = _read_json(file, list)
    has_numbers = bool(items) and all(
        isinstance(item, dict) and "label_idx" in item for item in items
    )
    labels: dict[str, int] = {} if has_numbers else _labels(annotation_file(data, "labels"))
    rows: list[Row] = []
    for number, item in enumerate(items, start=1):
        location = f"{file}: item {number}"
        if (
            not isinstance(item, dict)
            or not {"id", "label_idx" if has_numbers else "template"} <= item.keys()
        ):
            raise UserError(
                f"{location}: expected an object with 'id' and 'template', not "
                f"{json.dumps(item)[:80]}"
            )
        entry: dict[str, Any] = item
        template = str(entry.get("template", "")).replace("[", "").replace("]", "")
        if not has_numbers and template not in labels:
            raise UserError(
                f"{location}: the class {template!r} is not in {annotation_file(data, 'labels')}"
            )
        if has_numbers and not _NUMBER.fullmatch(str(entry["label_idx"])):
            raise UserError(
                f"{location}: 'label_idx' must be a class number, not "
                f"{json.dumps(entry['label_idx'])}"
            )
        if has_numbers:
            label = int(entry["label_idx"])
        else:
            label = labels[template]
        stem = str(entry["id"])
        rows.append(Row(folder.find(stem, default=f"{stem}.webm"), label, location))
    return Annotations(rows, sorted(labels, key=labels.__getitem__) or None)


def _read_kinetics(data: DataConfig, split: Split) -> Annotations:
    """Kinetics-400: columns by their header (``is_cc`` or not).

    Classes numbered in the order of their names.

    Clips are ``{id}_{start:06d}_{end:06d}`` or ``{id}``, flat or in folders of splits or classes.
    """
    tables = {each: _kinetics_table(data, each) for each in ("train", "val")}
    classes = sorted({line["label"] for table in tables.values() for _, line in table})
    if data.labels:
        classes = _named_classes(data)
    numbers = {name: number for number, name in enumerate(classes)}
    folder = VideoFolder(data)
    rows: list[Row] = []
    for location, line in tables[split]:
        if line["label"] not in numbers:
            raise UserError(f"{location}: the class {line['label']!r} is not in {data.labels}")
        stem = f"{line['youtube_id']}_{int(line['time_start']):06d}_{int(line['time_end']):06d}"
        name = folder.find(stem, line["youtube_id"], near=f"{split}", default=f"{stem}.mp4")
        rows.append(Row(name, numbers[line["label"]], location))
    return Annotations(rows, classes)


def _kinetics_table(data: DataConfig, split: str) -> list[tuple[str, dict[str, str]]]:
    file = annotation_file(data, "train" if split == "train" else "val")
    needed = ("label", "youtube_id", "time_start", "time_end")
    reader = csv.DictReader(io.StringIO(_text(file)))
    try:
        columns = reader.fieldnames or ()
        numbered = [(reader.line_num, line) for line in reader]
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num + 1}: not a line of csv: {error}") from None
    if not set(needed) <= {*columns}:
        raise UserError(
            f"{file}:1: expected the columns {', '.join(needed)}, not {', '.join(columns)}"
        )
    lines: list[tuple[str, dict[str, str]]] = []
    for number, line in numbered:
        location = f"{file}:{number}"
        seconds = (line["time_start"] or "", line["time_end"] or "")
        if not all(line[name] for name in needed) or not all(
            _NUMBER.fullmatch(each) for each in seconds
        ):
            raise UserError(f"{location}: expected a class, an id and two whole seconds")
        said = line.get("split") or split
        if (
            said == split or said[:3] == split[:3]
        ):  # some copies hold all splits, and say "validate"
            lines.append((location, line))
    return lines


def _read_ucf101(data: DataConfig, split: Split) -> Annotations:
    """UCF101: classInd.txt from 1.

    ``Class/v_Class_g01_c01.avi 1`` for training, no number for testing.

    The class is the folder's. Videos are found in any ending and case (``v_HandStandPushups`` lies
    in ``HandstandPushups``).
    """
    numbers: dict[str, int] = {}
    index = annotation_file(data, "labels")
    for number, line in enumerate(_text(index).splitlines(), start=1):
        if line.strip():
            parts = line.split()
            if len(parts) != 2 or not _NUMBER.fullmatch(parts[0]):
                raise UserError(f"{index}:{number}: expected '1 ApplyEyeMakeup', not {line!r}")
            numbers[parts[1].lower()] = int(parts[0]) - 1
    names = sorted(numbers, key=numbers.__getitem__)
    file = annotation_file(data, split)
    folder = VideoFolder(data)
    rows: list[Row] = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        path = Path(line.split()[0])
        location = f"{file}:{number}"
        label = numbers.get(path.parent.name.lower())
        if label is None:
            raise UserError(f"{location}: the class {path.parent.name!r} is not in {index}")
        if len(line.split()) > 1 and line.split()[1] != str(label + 1):
            raise UserError(
                f"{location}: says class {line.split()[1]}, but {index} says {label + 1} of "
                f"{path.parent.name}"
            )
        rows.append(
            Row(
                folder.find(path.stem, near=path.parent.name, default=path.as_posix()),
                label,
                location,
            )
        )
    return Annotations(rows, names)


def _read_hmdb51(data: DataConfig, split: Split) -> Annotations:
    """HMDB51: ``<class>_test_split<n>.txt``, a file a class.

    1 is training, 2 is testing, 0 is neither.
    """
    split_folder = annotation_file(data, split)
    wanted = "1" if split == "train" else "2"
    files = sorted(split_folder.glob(f"*_test_split{data.split}.txt"))
    if not files:
        raise UserError(
            f"data.{split}: no files <class>_test_split{data.split}.txt in {split_folder}"
        )
    classes = [re.sub(r"_test_split\d$", "", file.stem) for file in files]
    folder = VideoFolder(data)
    rows = list[Row]()
    for label, (name, file) in enumerate(zip(classes, files, strict=True)):
        for number, line in enumerate(_text(file).splitlines(), start=1):
            video, _, flag = line.strip().rpartition(" ")
            if line.strip() and flag not in ("0", "1", "2"):
                raise UserError(f"{file}:{number}: expected a video and 0, 1 or 2, not {line!r}")
            if flag == wanted:
                stem = Path(video.strip()).stem
                default = f"{name}/{video.strip()}"
                rows.append(
                    Row(folder.find(stem, near=name, default=default), label, f"{file}:{number}")
                )
    return Annotations(rows, classes)


def _read_folders(data: DataConfig, split: Split) -> Annotations:
    """A folder for each split, in it one for each class, in it videos.

    Classes numbered in the order of their names.

    Links are followed, of files and of folders. Hidden folders, and those without a video in either
    split, are no classes.
    """
    folders: dict[str, Path] = {part: annotation_file(data, part) for part in ("train", "val")}
    videos = absolute_path(Path(data.root) / data.videos)
    found: dict[str, dict[str, list[str]]] = {}
    for part, folder in folders.items():
        folder = absolute_path(folder)
        if not folder.is_dir() or not folder.is_relative_to(videos):
            raise UserError(
                f"data.{part}: {folder} must be a folder of class folders, below data.videos, "
                f"{videos}"
            )
        members = sorted(
            each for each in folder.iterdir() if each.is_dir() and not is_hidden(each.name)
        )
        found[part] = {each.name: sorted(videos_below(each)) for each in members}
    classes = sorted({name for part in found.values() for name, inside in part.items() if inside})
    empty = sorted({name for part in found.values() for name in part} - {*classes})
    if empty:
        notice(f"{data.root}: no video in {', '.join(empty)}: not taken for classes")
    folder = absolute_path(folders[split])
    inside = folder.relative_to(videos)
    rows = [
        Row((inside / name / video).as_posix(), label, str(folder / name))
        for label, name in enumerate(classes)
        for video in found[split].get(name, [])
    ]
    return Annotations(rows, classes)


_READERS: dict[str, Callable[[DataConfig, Split], Annotations]] = {
    "list": _read_list,
    "ssv2": _read_ssv2,
    "kinetics": _read_kinetics,
    "ucf101": _read_ucf101,
    "hmdb51": _read_hmdb51,
    "folders": _read_folders,
}


def _labels(file: Path) -> dict[str, int]:
    try:
        return {str(name): int(label) for name, label in _read_json(file, dict).items()}
    except (TypeError, ValueError):
        raise UserError(f"{file}: every class name must have a number") from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None


def _read_json(file: Path, kind: type[Any]) -> Any:
    try:
        content = parse_json(_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, kind):
        raise UserError(f"{file}: expected a JSON {'list' if kind is list else 'object'}")
    return content
