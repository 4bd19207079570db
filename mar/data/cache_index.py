"""The index of a frame cache: its videos, where their frames are, and whether they have changed.

A cache is a folder of shards. A shard is two files. ``00000.bin`` has the frames, one after another
as JPEG or raw RGB, and then the offset at which each one ends. ``00000.json`` has the position of
each video's frames and the SHA-256 of the other file. It is written last, so a shard that has it is
complete. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import InstanceOf, NonNegativeInt, PositiveInt, TypeAdapter

from mar.config.input_settings import DataConfig
from mar.data.video.paths import video_bytes
from mar.errors import UserError
from mar.safe_input import read_json

SETTINGS = "cache.json"
"""The file in a cache's folder that has its ``Packing``."""
BYTES_PER_END = 8
"""Size of an end offset, an int64."""


@dataclass(frozen=True)
class Packing:
    """How frames are stored."""

    format: Literal["jpeg", "raw"] = "jpeg"
    short_side: PositiveInt | None = 256
    """Pixels; smaller videos keep their size; None: all do."""
    quality: int = 90
    """Quality of JPEG, 1 to 100."""

    @property
    def is_exact(self) -> bool:
        """Whether it keeps the videos' own pixels."""
        return self.format == "raw" and self.short_side is None

    @property
    def name(self) -> str:
        """A name for messages and for a data set's fingerprint."""
        # Part of fingerprints, and so of identities: a change makes every cached trial a new one.
        return f"{self.format} {self.short_side}" + (
            f" q{self.quality}" if self.format == "jpeg" else ""
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One video in a shard."""

    name: InstanceOf[str]
    """Path below the video folder; it may have bytes that are not UTF-8, as file names may."""
    source_bytes: int
    """Size of the video's file when it was packed; -1: the file did not exist."""
    fps: float | None = None
    height: NonNegativeInt = 0
    width: NonNegativeInt = 0
    start: NonNegativeInt = 0
    """Offset of its first frame, in bytes."""
    ends_at: NonNegativeInt = 0
    """Offset of the table of its frames' ends, each an int64."""
    num_frames: NonNegativeInt = 0
    broken: InstanceOf[str] = ""
    """Why it has no frames; empty: it has some."""


# Made once: pydantic compiles a validator for each TypeAdapter. A cache may come from others, so
# what its files contain is checked before offsets are used.
_PACKING = TypeAdapter(Packing)
_ENTRIES = TypeAdapter(list[Entry])


# In place of annotations.Video: that module imports this one.
class Named(Protocol):
    """A video: its name and its path."""

    @property
    def name(self) -> str:
        """Its path below the video folder."""
        ...

    @property
    def path(self) -> Path:
        """Its file, which need not exist."""
        ...


class Index:
    """Every video of a cache: its shard's number and its entry.

    If a video has two entries, that of the later shard is valid.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packing = packing_of(folder)
        self.entries: dict[str, tuple[int, Entry]] = {}
        self.last_shard = -1
        for file in shard_files(folder):
            number = int(file.stem)
            self.last_shard = number
            # A video that was packed again is also in a later shard, which replaces the entry here.
            self.entries |= {entry.name: (number, entry) for entry in _entries(file)}

    def is_fresh(self, video: Named) -> bool:
        """Return whether a video is in the cache and its file has the same size as then.

        A video whose file no longer exists counts as unchanged: the cache replaces it.
        """
        if video.name not in self.entries:
            return False
        # The size only: hashing every video at each start would read the whole data set.
        size = _size(video.path)
        return size < 0 or size == self.entries[video.name][1].source_bytes

    def check(self, videos: Sequence[Named]) -> None:
        """Raise a UserError unless all videos are in the cache and have not changed since."""
        absent = [video.name for video in videos if video.name not in self.entries]
        stale = [
            video.name
            for video in videos
            if video.name in self.entries and not self.is_fresh(video)
        ]
        for problem, names in (("are not in it", absent), ("have changed since", stale)):
            if names:
                raise UserError(
                    f"data.cache: {len(names)} videos {problem}, the first: {names[0]}; run mar "
                    f"data pack again, into {self.folder}"
                )


def cache_folder(data: DataConfig, root: Path) -> Path:
    """Return the folder of the cache that ``data.cache: auto`` stands for, below ``root``.

    Data sets with the same video folder share it, whatever their splits.
    """
    videos = (Path(data.root) / data.videos).resolve()
    return root / hashlib.sha256(str(videos).encode(errors="surrogateescape")).hexdigest()[:16]


@lru_cache(maxsize=8)
def load_index(folder: str) -> Index:
    """Return the index of a folder; a process reads it once."""
    return Index(Path(folder))


def packing_of(folder: Path) -> Packing:
    """Return how a cache stores frames; raise a UserError if the folder has no cache."""
    try:
        return _PACKING.validate_python(read_json(folder / SETTINGS))
    except FileNotFoundError:
        raise UserError(
            f"data.cache: no frame cache in {folder}; make one: mar data pack RECIPE {folder}"
        ) from None
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{folder / SETTINGS}: not a frame cache's settings; remove the folder and pack again"
        ) from None


def shard_files(folder: Path) -> list[Path]:
    """Return the ``.json`` of every complete shard, in order."""
    # A name with a dot is a file that was being written when packing was interrupted.
    return [
        file
        for file in sorted(folder.glob("*.json"))
        if file.name != SETTINGS and not file.name.startswith(".")
    ]


def read_header(file: Path) -> dict[str, Any]:
    """Return the content of a shard's ``.json``: ``sha256``, ``bytes`` and ``entries``."""
    try:
        content = read_json(file)
        return {name: content[name] for name in ("sha256", "bytes", "entries")}
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(file) from None


def _entries(file: Path) -> list[Entry]:
    """Return the entries of a shard; raise a UserError if its files do not fit together."""
    header = read_header(file)
    # The size finds a shard that was cut off; its SHA-256 is compared only by "--verify".
    if _size(file.with_suffix(".bin")) != header["bytes"]:
        raise _damaged(file)
    try:
        entries = _ENTRIES.validate_python(header["entries"])
    except ValueError:
        raise _damaged(file) from None
    # Offsets past the end would otherwise be noticed only in the middle of a training.
    for entry in entries:
        table_end = entry.ends_at + BYTES_PER_END * entry.num_frames
        if entry.start > header["bytes"] or table_end > header["bytes"]:
            raise _damaged(file)
    return entries


def _damaged(file: Path) -> UserError:
    return UserError(f"{file}: damaged; remove it and its .bin, and run mar data pack again")


def _size(path: Path) -> int:
    """Return a video's size in bytes; -1: it does not exist or cannot be read."""
    try:
        return video_bytes(path)
    except OSError:
        return -1


def plain(entry: Entry) -> dict[str, Any]:
    """Return an entry as it is written to a shard's ``.json``."""
    return asdict(entry)
