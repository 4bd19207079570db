"""Reads the official annotation files of public data sets.

Something-Something v2, Kinetics-400, UCF101, HMDB51, Diving48 and Jester. Their files name videos,
but not the folder and the file ending that a user's copy has: ``VideoFolder`` finds those.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from mar.config.input_settings import DataConfig
from mar.data.annotation_files import (
    Annotations,
    Row,
    Split,
    annotation_file,
    named_classes,
    read_text,
)
from mar.data.video.files import VideoFolder
from mar.data.video.paths import is_folder
from mar.errors import UserError
from mar.safe_input import parse_json

_NUMBER = re.compile("[0-9]{1,9}")
"""A class number or a second; ``int`` raises an error for thousands of digits."""


def read_ssv2(data: DataConfig, split: Split) -> Annotations:
    """Read Something-Something v2: a JSON list of objects with "id" and "template".

    The class is the template without brackets. In the lists that the MAR release describes, each
    item has a class number, ``label_idx``; then no labels file is needed.
    """
    file = annotation_file(data, split)
    folder = VideoFolder(data)
    items = _read_json(file, list)
    has_numbers = bool(items) and all(
        isinstance(item, dict) and "label_idx" in item for item in items
    )
    labels: dict[str, int] = {} if has_numbers else _labels(annotation_file(data, "labels"))
    rows: list[Row] = []
    # The file is the user's, so every item is checked before it is used.
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
        # Templates write "[something]", the labels file "something".
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
        # A missing video keeps the name that it has in the official release.
        stem = str(entry["id"])
        rows.append(Row(folder.find(stem, default=f"{stem}.webm"), label, location))
    return Annotations(rows, sorted(labels, key=labels.__getitem__) or None)


def read_kinetics(data: DataConfig, split: Split) -> Annotations:
    """Read Kinetics-400: a csv file whose columns are found by their header.

    Classes are numbered in the order of their names. Clips are ``{id}_{start:06d}_{end:06d}`` or
    ``{id}``, in one folder or in folders of splits or classes.
    """
    # The classes of both splits are needed, so that a class has the same number in both.
    tables = {each: _kinetics_table(data, each) for each in ("train", "val")}
    classes = sorted({line["label"] for table in tables.values() for _, line in table})
    if data.labels:
        classes = named_classes(data)
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
    reader = csv.DictReader(io.StringIO(read_text(file)))
    # DictReader parses lazily, so both the header and the lines can raise csv.Error.
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
        # Some copies hold all splits in one file, and name the validation split "validate".
        stated = line.get("split") or split
        if stated == split or stated[:3] == split[:3]:
            lines.append((location, line))
    return lines


def read_ucf101(data: DataConfig, split: Split) -> Annotations:
    """Read UCF101: ``classInd.txt`` numbers the classes from 1.

    A line is ``Class/v_Class_g01_c01.avi 1`` for training, and has no number for testing. The class
    is the folder's name. Videos are found with any ending and case of letters: files
    ``v_HandStandPushups`` are in the folder ``HandstandPushups``.
    """
    numbers: dict[str, int] = {}
    index = annotation_file(data, "labels")
    for number, line in enumerate(read_text(index).splitlines(), start=1):
        if line.strip():
            parts = line.split()
            if len(parts) != 2 or not _NUMBER.fullmatch(parts[0]):
                raise UserError(f"{index}:{number}: expected '1 ApplyEyeMakeup', not {line!r}")
            # The official files differ in the case of letters, so classes are compared in lower
            # case.
            numbers[parts[1].lower()] = int(parts[0]) - 1
    names = sorted(numbers, key=numbers.__getitem__)
    file = annotation_file(data, split)
    folder = VideoFolder(data)
    rows: list[Row] = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        path = Path(line.split()[0])
        location = f"{file}:{number}"
        label = numbers.get(path.parent.name.lower())
        if label is None:
            raise UserError(f"{location}: the class {path.parent.name!r} is not in {index}")
        # A number that contradicts classInd.txt means that the two files do not belong together.
        if len(line.split()) > 1 and line.split()[1] != str(label + 1):
            raise UserError(
                f"{location}: has class {line.split()[1]}, but {index} has {label + 1} for "
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


def read_hmdb51(data: DataConfig, split: Split) -> Annotations:
    """Read HMDB51: one file for each class, ``<class>_test_split<n>.txt``.

    A line is a video and 1 for training, 2 for testing or 0 for neither.
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
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            # From the right, and stripped: the official lines end with a space.
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


def read_diving48(data: DataConfig, split: Split) -> Annotations:
    """Read Diving48: a JSON list of objects with "vid_name" and "label".

    The vocabulary is a list of classes, each a list of four words: take-off, somersaults, twists
    and position. Frame numbers are not used: every video is one dive.
    """
    file = annotation_file(data, split)
    folder = VideoFolder(data)
    rows: list[Row] = []
    for number, item in enumerate(_read_json(file, list), start=1):
        location = f"{file}: item {number}"
        if not isinstance(item, dict) or not {"vid_name", "label"} <= item.keys():
            raise UserError(
                f"{location}: expected an object with 'vid_name' and 'label', not "
                f"{json.dumps(item)[:80]}"
            )
        entry: dict[str, Any] = item
        if not _NUMBER.fullmatch(str(entry["label"])):
            raise UserError(
                f"{location}: 'label' must be a class number, not {json.dumps(entry['label'])}"
            )
        stem = str(entry["vid_name"])
        name = folder.find(stem, default=f"{stem}.mp4")
        rows.append(Row(name, int(entry["label"]), location))
    vocabulary = _read_json(annotation_file(data, "labels"), list)
    return Annotations(rows, [_joined(name) for name in vocabulary])


def _joined(name: Any) -> str:
    """Return the name of a class, which may be a list of its parts."""
    if isinstance(name, list):
        parts: list[Any] = name
        return " ".join(str(part) for part in parts)
    return str(name)


def read_jester(data: DataConfig, split: Split) -> Annotations:
    """Read Jester: lines of ``34870;Drumming Fingers``, and a file with a class name on each line.

    Its videos are folders of images, named by the number; files of that name are read too. The
    order of the names is the classes' order.
    """
    labels = annotation_file(data, "labels")
    names = [line.strip() for line in read_text(labels).splitlines() if line.strip()]
    numbers = {name: number for number, name in enumerate(names)}
    file = annotation_file(data, split)
    root = Path(data.root) / data.videos
    lines = [
        (number, line.strip())
        for number, line in enumerate(read_text(file).splitlines(), start=1)
        if line.strip()
    ]
    # Only a copy with files is searched: Jester's folders have more than five million images.
    is_of_images = any(is_folder(root / line.partition(";")[0]) for _, line in lines[:1000])
    folder = None if is_of_images else VideoFolder(data)
    rows: list[Row] = []
    for number, line in lines:
        location = f"{file}:{number}"
        video, separator, label = line.partition(";")
        if not separator or not video:
            raise UserError(f"{location}: expected '34870;Drumming Fingers', not {line!r}")
        if label not in numbers:
            raise UserError(f"{location}: the class {label!r} is not in {labels}")
        name = video if folder is None else folder.find(video, default=video)
        rows.append(Row(name, numbers[label], location))
    return Annotations(rows, names)


def _labels(file: Path) -> dict[str, int]:
    """Return the number of each class name; the official file has the numbers as strings."""
    try:
        return {str(name): int(label) for name, label in _read_json(file, dict).items()}
    except (TypeError, ValueError):
        raise UserError(f"{file}: every class name must have a number") from None


def _read_json(file: Path, kind: type[Any]) -> Any:
    try:
        # JSONDecodeError has the line; for deep nesting parse_json raises a plain ValueError.
        content = parse_json(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, kind):
        raise UserError(f"{file}: expected a JSON {'list' if kind is list else 'object'}")
    return content
