"""Reads annotations in any format of ``data.format``: here lists and folders of classes.

The formats of public data sets are in ``mar.data.official_formats``. Each reader returns rows: a
video's path below the video folder, its class number, and the line of the annotation file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mar import plugins
from mar.config.input_settings import DataConfig
from mar.data.annotation_files import Annotations, Row, Split, annotation_file, named_classes
from mar.data.official_formats import (
    read_diving48,
    read_hmdb51,
    read_jester,
    read_kinetics,
    read_ssv2,
    read_ucf101,
)
from mar.data.video.files import absolute_path, videos_below
from mar.data.video.paths import is_file, is_hidden
from mar.errors import UserError, notice


def read_annotations(data: DataConfig, split: Split) -> Annotations:
    """Return the annotations of a split.

    Raises:
        UserError: a missing file, or a line that cannot be understood; the message names file and
            line.
    """
    if data.format not in _READERS:
        reader: Reader = plugins.load(plugins.FORMATS, data.format)
        return reader(data, split)
    return _READERS[data.format](data, split)


Reader = Callable[[DataConfig, Split], Annotations]
"""A reader of a format; of a package's own too. It raises a UserError for the user's mistakes."""


_LONGEST_LINE = 10_000
"""Characters. Matching a line of blanks takes time that grows with the square of its length; a path
has at most 4,096 characters."""
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

    White space, a comma, a semicolon or a bar separates them. The path may contain spaces, and may
    be in double quotes, as pandas and spreadsheets write it. The file in ``data.labels``, if set,
    has the class names, one per line.
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
        # Inside quotes, csv writes a double quote twice.
        name = quoted.replace('""', '"') if quoted else found["plain"]
        # Bytes that are not UTF-8 were read as U+DC80 to U+DCFF. A file may really have such a
        # name; if not, the list was probably saved in another encoding.
        if (
            not name.isprintable()
            and "\udc80" <= max(name) <= "\udcff"
            and not is_file(folder / name)
        ):
            raise UserError(
                f"{location}: {name!r} is not UTF-8 text, and no such file exists; save the "
                "list as UTF-8"
            )
        # On Linux a backslash is a character like others, so the file itself decides.
        if "\\" in name and not is_file(folder / name):
            raise UserError(
                f"{location}: {name!r} has Windows' backslashes; write / between folders"
            )
        rows.append(Row(name, int(found["label"]), location))
    return Annotations(rows, named_classes(data) if data.labels else None)


def _list_text(file: Path) -> str:
    """Return a list's text; bytes that are not UTF-8 are kept.

    Linux allows file names that are not UTF-8; Python's ``surrogateescape`` reads and writes them
    without loss.
    """
    try:
        return file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None


def _read_folders(data: DataConfig, split: Split) -> Annotations:
    """Read a folder for each split, with a folder of videos for each class.

    Classes are numbered in the order of their names. Links to files and folders are followed.
    Hidden folders, and those without a video in either split, are no classes.
    """
    # Both splits are read: a class may have videos in one of them only, and its number must be the
    # same in both.
    folders: dict[str, Path] = {part: annotation_file(data, part) for part in ("train", "val")}
    videos = absolute_path(Path(data.root) / data.videos)
    found: dict[str, dict[str, list[str]]] = {}
    for part, folder in folders.items():
        # Not resolved: with links followed, a linked folder would not be below data.videos.
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
        notice(f"{data.root}: no video in {', '.join(empty)}: not used as classes")
    folder = absolute_path(folders[split])
    inside = folder.relative_to(videos)
    rows = [
        Row((inside / name / video).as_posix(), label, str(folder / name))
        for label, name in enumerate(classes)
        for video in found[split].get(name, [])
    ]
    return Annotations(rows, classes)


_READERS: dict[str, Reader] = {
    "list": _read_list,
    "ssv2": read_ssv2,
    "kinetics": read_kinetics,
    "ucf101": read_ucf101,
    "hmdb51": read_hmdb51,
    "diving48": read_diving48,
    "jester": read_jester,
    "folders": _read_folders,
}
