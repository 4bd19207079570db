"""Which videos a split has, their labels, and the data's fingerprint in a trial's identity."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mar.config.schema import DataConfig
from mar.data import cache_index
from mar.data.annotation_files import Row, Split, annotation_file
from mar.data.annotation_formats import read_annotations
from mar.errors import UserError

_FINGERPRINTED_FILES = 1000
"""Video sizes that go into a fingerprint, spread evenly over the split: enough to notice another
encoding."""

_State = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Video:
    """One labelled video."""

    name: str
    """Its path below the video folder."""
    path: Path
    label: int


def read_split(data: DataConfig, split: Split) -> list[Video]:
    """Return the labelled videos of a split, in the order of the annotation file.

    A process reads it once.

    With ``data.missing: skip``, those that are not there are left out, and it is seen each time
    which are; what the frame cache has is there.

    Raises:
        UserError: a missing file, a line that cannot be understood, an unknown class, or a path
            that leaves the data root. The message names file and line.
    """
    if data.missing == "skip":
        read = _read_split.__wrapped__
    else:
        read = _read_split
    return [*read(data.model_dump_json(), split, _state(data))]


@lru_cache(maxsize=4)
def _read_split(settings: str, split: Split, _: _State) -> list[Video]:
    data = DataConfig.model_validate_json(settings)

    def refuse(row: Row, reason: str) -> None:
        raise UserError(f"{row.location}: {reason}")

    videos = list(videos_of(data, split, refuse))
    there = [video for video in videos if data.missing == "error" or _size(data, video) >= 0]
    if not there:
        if videos:
            state = f"none of its {len(videos)} videos is there"
        else:
            state = "no videos in it"
        raise UserError(
            f"data.{split}: {state}; it must name at least one below "
            f"{Path(data.root) / data.videos}"
        )
    return there


def _state(data: DataConfig) -> _State:
    """Return what tells that a list or the folder of the videos has changed."""
    paths = [Path(data.root), Path(data.root) / data.videos]
    for what in ("train", "val", "labels"):
        with suppress(UserError):
            found = annotation_file(data, what)
            within = (
                found.iterdir() if found.is_dir() else ()
            )  # a list for each class, or the classes' folders
            paths += [found, *within]
    there = [location.stat() for location in paths if location.exists()]
    return tuple((each.st_ino, each.st_mtime_ns, each.st_size) for each in there)


def videos_of(
    data: DataConfig, split: Split, refuse: Callable[[Row, str], None]
) -> Iterator[Video]:
    """Yield the videos of a split; ``refuse`` is told of rows that cannot be used, and why."""
    check_root(data)
    # From the root on: what a decoder is given must be a file's path, also where a name looks like
    # an address.
    folder = Path(os.path.abspath(Path(data.root) / data.videos))  # noqa: PTH100  (resolve follows links)
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
    """Return a path below the video folder, however it was written; none if it leaves the folder.

    ``./a.mp4``, ``b/../a.mp4`` and the absolute path of ``a.mp4`` are the same video. Links in the
    folder are followed: they are the user's own.
    """
    path = os.path.normpath(name)
    if os.path.isabs(path):  # noqa: PTH117  (a hundred thousand Paths take seconds)
        for root in (f"{folder}/", f"{resolved}/"):
            if path.startswith(root):
                return path.removeprefix(root)
        return None
    if path in (".", "..") or path.startswith("../") or "\0" in path:
        return None
    return path


def _size(data: DataConfig, video: Video) -> int:
    """Return a video's bytes, or what they were when it was packed; -1: it is not there."""
    with suppress(OSError):
        return video.path.stat().st_size
    if data.cache:
        known = cache_index.load_index(data.cache).entries.get(video.name)
    else:
        known = None
    return known[1].source_bytes if known else -1


def check_root(data: DataConfig) -> None:
    """Raise a UserError unless the data's folder is there and has something in it."""
    root = Path(data.root)
    if not root.is_dir() or not any(root.iterdir()):
        state = "is empty" if root.is_dir() else "does not exist"
        raise UserError(
            f"data.root: the folder {root} {state}; put the data set there or set data.root"
        )


def class_names(data: DataConfig) -> list[str]:
    """Return the classes' names by number.

    Their numbers, where the format has no names or not that many.
    """
    names = _read_classes(data.model_dump_json(), _state(data))
    return [
        *names[: data.num_classes],
        *(str(number) for number in range(len(names), data.num_classes)),
    ]


@lru_cache(maxsize=4)
def _read_classes(settings: str, _: _State) -> list[str]:
    return read_annotations(DataConfig.model_validate_json(settings), "val").classes or []


def fingerprint(data: DataConfig) -> str:
    """Return a hash of both splits' names and labels and of their videos' sizes.

    Equal content, equal hash.

    It stands for ``data.root`` and the annotation files' paths in a trial's identity. Of large
    splits it looks at a thousand sizes, spread evenly: another encoding of all is noticed, that of
    one video may not be.
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
    if data.cache:  # its frames are smaller, and compressed: other pixels
        digest.update(cache_index.packing_of(Path(data.cache)).name.encode())
    return digest.hexdigest()[:16]
