"""What a frame cache holds: which videos, where their frames are, whether they are as they were.

Imports no torch.

A cache is a folder of shards. A shard is ``00000.bin``, frame after frame as JPEG or raw RGB and
then where each ends, and ``00000.json``, which says where each video's frames are and the shard's
SHA-256, and is written last: a shard that has one is whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import InstanceOf, NonNegativeInt, PositiveInt, TypeAdapter

from mar.config.schema import DataConfig
from mar.errors import UserError
from mar.safe_input import read_json

SETTINGS = "cache.json"
"""In a cache's folder: how it keeps frames."""
BYTES_PER_END = 8


@dataclass(frozen=True)
class Packing:
    """How frames are kept."""

    format: Literal["jpeg", "raw"] = "jpeg"
    short_side: PositiveInt | None = 256
    """Pixels; smaller videos keep their size; None: all do."""
    quality: int = 90
    """Of JPEG, 1 to 100."""

    @property
    def is_exact(self) -> bool:
        """Whether it keeps the videos' own pixels."""
        return self.format == "raw" and self.short_side is None

    @property
    def name(self) -> str:
        """What stands for it in a fingerprint."""
        return f"{self.format} {self.short_side}" + (
            f" q{self.quality}" if self.format == "jpeg" else ""
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One video in a shard."""

    name: InstanceOf[str]
    """It may have bytes that are not UTF-8, as a file's name may."""
    source_bytes: int
    """Size of the video when it was packed; -1: it was not there."""
    fps: float | None = None
    height: NonNegativeInt = 0
    width: NonNegativeInt = 0
    start: NonNegativeInt = 0
    """Where its first frame begins."""
    ends_at: NonNegativeInt = 0
    """Where the ends of its frames are, each an int64."""
    num_frames: NonNegativeInt = 0
    broken: InstanceOf[str] = ""
    """Why it has no frames."""


_PACKING = TypeAdapter(Packing)
_ENTRIES = TypeAdapter(list[Entry])


class Named(Protocol):
    """A video: its name, and where it would be."""

    @property
    def name(self) -> str:
        """Its path below the video folder."""
        ...

    @property
    def path(self) -> Path:
        """Its file."""
        ...


class Index:
    """Every video of a cache: its shard's number and its entry.

    Of two entries the later shard's stands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packing = packing_of(folder)
        self.entries: dict[str, tuple[int, Entry]] = {}
        self.last_shard = -1
        for file in shard_files(folder):
            number = int(file.stem)
            self.last_shard = number
            self.entries |= {entry.name: (number, entry) for entry in _entries(file)}

    def is_fresh(self, video: Named) -> bool:
        """Whether a video is in it and has not changed its size since.

        Of one that is gone there is nothing newer.
        """
        if video.name not in self.entries:
            return False
        size = _size(video.path)
        return size < 0 or size == self.entries[video.name][1].source_bytes

    def check(self, videos: Sequence[Named]) -> None:
        """Raise a UserError unless all videos are in it, as they are now."""
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
    """Return the index of a folder, read once in a process."""
    return Index(Path(folder))


def packing_of(folder: Path) -> Packing:
    """Return how a cache keeps frames; raises a UserError if the folder holds none."""
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
    """Return the ``.json`` of every whole shard, in order."""
    return [
        file
        for file in sorted(folder.glob("*.json"))
        if file.name != SETTINGS and not file.name.startswith(".")
    ]


def read_header(file: Path) -> dict[str, Any]:
    """Return what a shard's file says: ``sha256``, ``bytes`` and ``entries``."""
    try:
        content = read_json(file)
        return {name: content[name] for name in ("sha256", "bytes", "entries")}
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(file) from None


def _entries(file: Path) -> list[Entry]:
    said = read_header(file)
    if _size(file.with_suffix(".bin")) != said["bytes"]:
        raise _damaged(file)
    try:
        entries = _ENTRIES.validate_python(said["entries"])
    except ValueError:
        raise _damaged(file) from None
    for entry in entries:
        if (
            entry.start > said["bytes"]
            or entry.ends_at + BYTES_PER_END * entry.num_frames > said["bytes"]
        ):
            raise _damaged(file)
    return entries


def _damaged(file: Path) -> UserError:
    return UserError(f"{file}: damaged; remove it and its .bin, and run mar data pack again")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def plain(entry: Entry) -> dict[str, Any]:
    """Return an entry as a shard's file has it."""
    return asdict(entry)
