"""The frame cache: each video's frames written once, small, so that fifty trials do not decode it fifty times.

A cache is a folder of shards. A shard is ``00000.bin``, frame after frame as JPEG or raw RGB, and ``00000.json``, which
says where each video's frames are and the shard's SHA-256, and is written last: a shard that has one is whole. A cache
that was cut short goes on where it stopped; a video that has changed since makes it stale, which is said.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from mar.annotations import CACHE_SETTINGS, Video, read_split
from mar.config import DataConfig
from mar.errors import Failure, UserError
from mar.video import BrokenVideo, Frames, Reader

_VIDEOS_PER_SHARD = 64


@dataclass(frozen=True)
class Packing:
    """How frames are kept."""

    format: Literal["jpeg", "raw"] = "jpeg"
    short_side: int = 256
    """Pixels; smaller videos keep their size."""
    quality: int = 90
    """Of JPEG, 1 to 100."""

    @property
    def name(self) -> str:
        """What stands for it in a fingerprint."""
        return f"{self.format} {self.short_side}" + (f" q{self.quality}" if self.format == "jpeg" else "")


@dataclass(frozen=True)
class Entry:
    """One video in a shard."""

    name: str
    source_bytes: int
    """Size of the video when it was packed."""
    fps: float | None = None
    height: int = 0
    width: int = 0
    ends: list[int] = field(default_factory=list[int])
    """Where each frame ends in the shard; one begins where the one before ends, the first at ``start``."""
    start: int = 0
    broken: str = ""
    """Why it has no frames."""


def pack(data: DataConfig, folder: Path, packing: Packing, processes: int, progress: Callable[[int, int], None]) -> int:
    """Write the videos of both splits into ``folder``; returns how many were there already.

    Raises:
        UserError: the annotations cannot be read, or the folder holds a cache of another kind.
        Failure: the disk refuses.
    """
    videos = {video.name: video for split in ("train", "val") for video in read_split(data, split)}
    settings = folder / CACHE_SETTINGS
    if settings.is_file() and _packing(folder) != packing:
        raise UserError(f"{folder} holds a cache of {_packing(folder).name}: choose another folder, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(settings, json.dumps(asdict(packing)).encode())
    except OSError as error:
        raise Failure(f"could not write {folder}: {error.strerror or error}; choose another folder") from None
    shards = _shards(folder)
    fresh = {name for shard in shards.values() for name, entry in shard.items() if _is_fresh(entry, videos.get(name))}
    todo = [video for name, video in sorted(videos.items()) if name not in fresh]
    parts = [todo[first : first + _VIDEOS_PER_SHARD] for first in range(0, len(todo), _VIDEOS_PER_SHARD)]
    first = max(shards, default=-1) + 1
    done = len(fresh)
    progress(done, len(videos))
    for count in _each(partial(_pack_shard, folder, packing), list(enumerate(parts, start=first)), processes):
        done += count
        progress(done, len(videos))
    return len(fresh)


def _each(
    write: Callable[[tuple[int, list[Video]]], int], parts: list[tuple[int, list[Video]]], processes: int
) -> Iterator[int]:
    """Write the parts, here or in other processes; yields each one's number of videos when it is there."""
    if processes == 1:
        yield from map(write, parts)
        return
    with multiprocessing.get_context("forkserver").Pool(processes, initializer=_hush) as pool:
        yield from pool.imap_unordered(write, parts)


def verify(folder: Path, progress: Callable[[int, int], None]) -> list[str]:
    """Return the shards whose content is not what was written."""
    damaged: list[str] = []
    files = sorted(folder.glob("*.json"))
    files = [file for file in files if file.name != CACHE_SETTINGS]
    for done, file in enumerate(files, start=1):
        content = file.with_suffix(".bin")
        try:
            with content.open("rb") as stream:
                is_whole = hashlib.file_digest(stream, "sha256").hexdigest() == _told(file)["sha256"]
        except (OSError, UserError):
            is_whole = False
        if not is_whole:
            damaged.append(content.name)
        progress(done, len(files))
    return damaged


class FrameCache:
    """An opened cache; frames are read where they lie, and pages are shared by all processes of a machine."""

    def __init__(self, folder: Path) -> None:
        if not (folder / CACHE_SETTINGS).is_file():
            raise UserError(f"data.cache: no frame cache in {folder}; make one: mar data pack RECIPE {folder}")
        self.folder, self.packing = folder, _packing(folder)
        self.places = {
            name: (shard, entry) for shard, entries in _shards(folder).items() for name, entry in entries.items()
        }

    def check(self, videos: Sequence[Video]) -> None:
        """Raise a UserError unless all videos are in it as they are now (or are only in it)."""
        absent = [video.name for video in videos if video.name not in self.places]
        stale = [
            video.name
            for video in videos
            if video.name in self.places and not _is_fresh(self.places[video.name][1], video)
        ]
        for words, names in (("are not in it", absent), ("have changed since", stale)):
            if names:
                raise UserError(
                    f"data.cache: {len(names)} videos {words}, the first: {names[0]}; run mar data pack again, into {self.folder}"
                )

    def open(self, video: Video) -> CachedVideo:
        """Return a video's frames.

        Raises:
            BrokenVideo: it gave none when it was packed.
        """
        shard, entry = self.places[video.name]
        if entry.broken:
            raise BrokenVideo(video.path, entry.broken)
        return CachedVideo(_mapped(self.folder / f"{shard:05}.bin"), entry, self.packing)


class CachedVideo:
    """What ``video.Reader`` is for a file."""

    def __init__(self, content: np.memmap[Any, Any], entry: Entry, packing: Packing) -> None:
        self.content, self.entry, self.packing = content, entry, packing

    def __enter__(self) -> CachedVideo:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __len__(self) -> int:
        return len(self.entry.ends)

    @property
    def fps(self) -> float | None:
        """The video's frames a second."""
        return self.entry.fps

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers, ``[len(indices), H, W, 3]``."""
        last = len(self) - 1
        return np.stack([self._frame(min(index, last)) for index in indices])

    def _frame(self, index: int) -> Frames:
        start = self.entry.ends[index - 1] if index else self.entry.start
        part = self.content[start : self.entry.ends[index]]
        if self.packing.format == "raw":
            return part.reshape(self.entry.height, self.entry.width, 3)
        from torchvision.io import decode_jpeg

        decoded: Any = decode_jpeg(torch.from_numpy(np.array(part)))
        return decoded.permute(1, 2, 0).numpy()


@lru_cache(maxsize=8)
def opened(folder: str) -> FrameCache:
    """Return the cache of a folder, read once in a process."""
    return FrameCache(Path(folder))


def open_video(data: DataConfig, video: Video) -> Reader | CachedVideo:
    """Return a video's reader: from the cache where there is one, else from its file."""
    return opened(data.cache).open(video) if data.cache else Reader(video.path)


@lru_cache(maxsize=256)
def _mapped(file: Path) -> np.memmap[Any, Any]:
    return np.memmap(file, dtype=np.uint8, mode="r")


def _is_fresh(entry: Entry, video: Video | None) -> bool:
    """Whether an entry is of the video as it is now; of one that is not here, there is nothing newer."""
    return video is not None and (not video.path.is_file() or video.path.stat().st_size == entry.source_bytes)


def _packing(folder: Path) -> Packing:
    try:
        return Packing(**json.loads((folder / CACHE_SETTINGS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{folder / CACHE_SETTINGS}: not a frame cache's settings; remove the folder and pack again"
        ) from None


def _shards(folder: Path) -> dict[int, dict[str, Entry]]:
    """Return each whole shard's entries by name; a later shard's stand for an earlier one's of the same name."""
    shards: dict[int, dict[str, Entry]] = {}
    for file in sorted(folder.glob("*.json")):
        if file.name != CACHE_SETTINGS and file.with_suffix(".bin").is_file():
            shards[int(file.stem)] = {entry["name"]: Entry(**entry) for entry in _told(file)["entries"]}
    return shards


def _told(file: Path) -> dict[str, Any]:
    """Return what a shard's file says."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return {"sha256": told["sha256"], "entries": told["entries"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: damaged; remove it, and run mar data pack again") from None


def _pack_shard(folder: Path, packing: Packing, part: tuple[int, list[Video]]) -> int:
    """Write one shard: the frames, then the file that says it is whole; returns its number of videos."""
    number, videos = part
    entries: list[Entry] = []
    unfinished, digest = folder / f".{number:05}.bin", hashlib.sha256()
    try:
        with unfinished.open("wb") as file:
            for video in videos:
                entry = Entry(video.name, video.path.stat().st_size if video.path.is_file() else -1, start=file.tell())
                try:
                    with Reader(video.path) as reader:
                        for frame in (_small(each, packing.short_side) for each in reader):
                            blob = _encoded(frame, packing)
                            digest.update(blob)
                            file.write(blob)
                            entry.ends.append(file.tell())
                            entry = replace(entry, height=frame.shape[0], width=frame.shape[1], fps=reader.fps)
                except BrokenVideo as broken:
                    entry = Entry(video.name, entry.source_bytes, broken=broken.reason)
                entries.append(entry)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(folder / f"{number:05}.bin")
        told = {"sha256": digest.hexdigest(), "entries": [asdict(entry) for entry in entries]}
        _write(folder / f"{number:05}.json", json.dumps(told).encode())
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise Failure(f"could not write {folder}: {error.strerror or error}; what is packed is kept") from None
    return len(videos)


def _small(frame: Frames, short_side: int) -> Frames:
    """Return a frame whose short side is at most ``short_side`` (bilinear, antialiased)."""
    height, width = frame.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1:
        return frame
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def _encoded(frame: Frames, packing: Packing) -> bytes:
    if packing.format == "raw":
        return frame.tobytes()
    from torchvision.io import encode_jpeg

    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).contiguous()
    encoded: Any = encode_jpeg(pixels, quality=packing.quality)
    return encoded.numpy().tobytes()


def _write(file: Path, content: bytes) -> None:
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_bytes(content)
    unfinished.rename(file)


def _hush() -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
