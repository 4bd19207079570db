"""The videos of a split and their labels; the data's fingerprint in a trial's identity."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mar.config.input_settings import DataConfig
from mar.data import cache_index
from mar.data.annotation_files import Row, Split, annotation_file
from mar.data.annotation_formats import read_annotations
from mar.data.video.paths import video_bytes
from mar.errors import UserError

_FINGERPRINTED_FILES = 1000
"""Number of video sizes in a fingerprint, spread evenly over the split: enough to notice that all
videos were encoded again."""

_State = tuple[tuple[int, int, int], ...]
"""Inode, modification time and size of each file or folder on which a split depends."""


@dataclass(frozen=True)
class Video:
    """One labelled video."""

    name: str
    """The video's path below the video folder."""
    path: Path
    label: int


def read_split(data: DataConfig, split: Split) -> list[Video]:
    """Return the labelled videos of a split, in the order of the annotation file.

    A process reads the file once, and again after it has changed. With ``data.missing: skip``,
    videos that do not exist are left out; a video in the frame cache counts as existing.

    Raises:
        UserError: a missing file, a line that cannot be understood, an unknown class, or a path
            that leaves the data root. The message names file and line.
    """
    # Reading the lists of a large data set takes seconds. With "skip" the result also depends on
    # which videos exist, and that can change without a change of _state().
    if data.missing == "skip":
        read = _read_split.__wrapped__
    else:
        read = _read_split
    # A copy, so that callers cannot change the cached list.
    return [*read(data.model_dump_json(), split, _state(data))]


# The last argument is only part of lru_cache's key: a changed file gives another key, so the split
# is read again.
@lru_cache(maxsize=4)
def _read_split(settings: str, split: Split, _: _State) -> list[Video]:
    data = DataConfig.model_validate_json(settings)

    def refuse(row: Row, reason: str) -> None:
        raise UserError(f"{row.location}: {reason}")

    videos = list(videos_of(data, split, refuse))
    existing = [video for video in videos if data.missing == "error" or _size(data, video) >= 0]
    if not existing:
        if videos:
            state = f"none of its {len(videos)} videos exists"
        else:
            state = "no videos in it"
        raise UserError(
            f"data.{split}: {state}; it must name at least one below "
            f"{Path(data.root) / data.videos}"
        )
    return existing


def _state(data: DataConfig) -> _State:
    """Return a value that changes with an annotation file or with the folder of the videos."""
    paths = [Path(data.root), Path(data.root) / data.videos]
    for what in ("train", "val", "labels"):
        with suppress(UserError):
            found = annotation_file(data, what)
            # A folder has one list for each class (HMDB51), or the folders of the classes.
            within = found.iterdir() if found.is_dir() else ()
            paths += [found, *within]
    states = [location.stat() for location in paths if location.exists()]
    return tuple((each.st_ino, each.st_mtime_ns, each.st_size) for each in states)


def videos_of(
    data: DataConfig, split: Split, refuse: Callable[[Row, str], None]
) -> Iterator[Video]:
    """Yield the videos of a split; call ``refuse`` with each unusable row and the reason."""
    check_root(data)
    # Absolute, so that a decoder takes every name for a file's path, even one like an address.
    # Not Path.resolve, which follows links.
    folder = Path(os.path.abspath(Path(data.root) / data.videos))  # noqa: PTH100
    resolved = folder.resolve()
    for row in read_annotations(data, split).rows:
        name = _below(row.name, folder, resolved)
        if name is None:
            refuse(row, f"{row.name} leaves the video folder {folder}; paths must stay below it")
        elif not 0 <= row.label < data.num_classes:
            refuse(
                row, f"class {row.label} is outside 0 … {data.num_classes - 1} (data.num_classes)"
            )
        else:
            yield Video(name, folder / name, row.label)


def _below(name: str, folder: Path, resolved: Path) -> str | None:
    """Return a name as a path below the video folder; None if it leaves the folder.

    ``./a.mp4``, ``b/../a.mp4`` and the absolute path of ``a.mp4`` are the same video. Links in the
    folder are followed, because the user made them.
    """
    # Lists come from others: a name such as ../../key must not be opened.
    path = os.path.normpath(name)
    if os.path.isabs(path):  # noqa: PTH117  (a hundred thousand Paths take seconds)
        # An absolute path may have been written with or without the folder's links followed.
        for root in (f"{folder}/", f"{resolved}/"):
            if path.startswith(root):
                return path.removeprefix(root)
        return None
    if path in (".", "..") or path.startswith("../") or "\0" in path:
        return None
    return path


def _size(data: DataConfig, video: Video) -> int:
    """Return the size of a video's file, or its size when it was packed; -1: it does not exist."""
    with suppress(OSError):
        return video_bytes(video.path)
    if data.cache_folder:
        known = cache_index.load_index(data.cache_folder).entries.get(video.name)
    else:
        known = None
    return known[1].source_bytes if known else -1


def check_root(data: DataConfig) -> None:
    """Raise a UserError unless the data's folder exists and is not empty."""
    root = Path(data.root)
    if not root.is_dir() or not any(root.iterdir()):
        state = "is empty" if root.is_dir() else "does not exist"
        raise UserError(
            f"data.root: the folder {root} {state}; put the data set there or set data.root"
        )


def class_names(data: DataConfig) -> list[str]:
    """Return the classes' names by number.

    A class without a name in the annotations has its number as its name.
    """
    names = _read_classes(data.model_dump_json(), _state(data))
    return [
        *names[: data.num_classes],
        *(str(number) for number in range(len(names), data.num_classes)),
    ]


@lru_cache(maxsize=4)
def _read_classes(settings: str, _: _State) -> list[str]:
    # Either split has all class names, so it does not matter which is read.
    return read_annotations(DataConfig.model_validate_json(settings), "val").classes or []


def fingerprint(data: DataConfig) -> str:
    """Return a hash of the names and labels of both splits and of their videos' sizes.

    In a trial's identity it replaces ``data.root`` and the paths of the annotation files, so equal
    data in another folder are the same data. Of a large split only about a thousand sizes are used:
    a new encoding of all videos is noticed, that of a single one may not be.
    """
    digest = hashlib.sha256()
    for split in ("train", "val"):
        videos = read_split(data, split)
        digest.update(
            "".join(f"{split}\t{video.name}\t{video.label}\n" for video in videos).encode(
                errors="surrogateescape"
            )
        )
        for video in videos[:: max(1, len(videos) // _FINGERPRINTED_FILES)]:
            digest.update(f"{video.name}\t{_size(data, video)}\n".encode(errors="surrogateescape"))
    if data.cache_folder:
        packing = cache_index.packing_of(Path(data.cache_folder))
        # Frames that were scaled or compressed are other pixels, and give other results.
        if not packing.is_exact:
            digest.update(packing.name.encode())
    return digest.hexdigest()[:16]
