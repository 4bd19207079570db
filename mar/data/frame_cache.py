"""The frame cache: each video's frames, decoded once and stored at a small size.

So fifty trials do not decode a video fifty times. Packing that was interrupted resumes where it
stopped. A video that has changed since makes the cache stale, which is an error. The layout is
described in ``mar.data.cache_index``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout

from mar.atomic_dir import atomic_write
from mar.config.input_settings import DataConfig
from mar.data import process_pool
from mar.data.annotations import Video, read_split
from mar.data.cache_index import (
    BYTES_PER_END,
    SETTINGS,
    Entry,
    Index,
    Packing,
    load_index,
    packing_of,
    plain,
    read_header,
    shard_files,
)
from mar.data.decoders import check as check_decoder
from mar.data.sampling import Reader
from mar.data.video.paths import is_video, video_bytes
from mar.data.video.sequential_reader import BrokenVideo, Frames
from mar.errors import Failure, UserError

# An interrupted packing loses at most the shards in progress, one for each process.
_VIDEOS_PER_SHARD = 64


def pack(
    data: DataConfig,
    folder: Path,
    packing: Packing,
    processes: int,
    progress: Callable[[int, int], None],
) -> int:
    """Write the videos of both splits into ``folder``; return how many it had already.

    A video that gave no frames before is tried again. ``progress`` is called with the number of
    finished videos and the total.

    Raises:
        UserError: the annotations cannot be read, the folder has a cache with another packing, or
            another process is packing it.
        Failure: the folder cannot be written.
    """
    check_decoder(data.decoder)
    # Without the cache setting the videos are looked up in their folder, not in the cache that is
    # being written.
    data = data.model_copy(update={"cache": None})
    videos = {video.name: video for split in ("train", "val") for video in read_split(data, split)}
    settings = folder / SETTINGS
    if settings.is_file() and packing_of(folder) != packing:
        raise UserError(
            f"{folder} holds a cache of {packing_of(folder).name}: choose another folder, or "
            "remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            atomic_write(settings, json.dumps(asdict(packing)).encode())
            # load_index() remembers a folder's index, which packing changes.
            try:
                return _pack(data, videos, Index(folder), processes, progress)
            finally:
                load_index.cache_clear()
    except Timeout:
        raise UserError(
            f"{folder} is being packed by another process: wait for it, or choose another folder"
        ) from None
    except OSError as error:
        raise Failure(
            f"could not write {folder}: {error.strerror or error}; choose another folder"
        ) from None


def _pack(
    data: DataConfig,
    videos: dict[str, Video],
    index: Index,
    processes: int,
    progress: Callable[[int, int], None],
) -> int:
    fresh = {
        name
        for name, video in videos.items()
        if index.is_fresh(video) and not index.entries[name][1].broken
    }
    # Sorted, so that equal data make equal shards.
    todo = [video for name, video in sorted(videos.items()) if name not in fresh]
    parts = [
        todo[first : first + _VIDEOS_PER_SHARD] for first in range(0, len(todo), _VIDEOS_PER_SHARD)
    ]
    done = len(fresh)
    progress(done, len(videos))
    # New shards get new numbers. Of two entries for a video, Index uses the one with the higher
    # number, so an old shard stays valid and is never rewritten.
    write = partial(_pack_shard, index.folder, index.packing, data.decoder)
    numbered = list(enumerate(parts, start=index.last_shard + 1))
    counts: Iterator[int]
    if processes == 1:
        counts = map(write, numbered)
    else:
        counts = process_pool.each(write, numbered, processes, _crashed)
    for count in counts:
        done += count
        progress(done, len(videos))
    return len(fresh)


def _crashed(part: tuple[int, list[Video]]) -> int:
    """Raise a Failure: a decoder ended its process, so the shard was not written."""
    first = part[1][0].name
    last = part[1][-1].name
    raise Failure(
        f"a decoder ended its process over a video from {first} to {last}: mar data check finds "
        "which one"
    )


def verify(folder: Path, progress: Callable[[int, int], None]) -> list[str]:
    """Return the names of the shards whose SHA-256 is not the one that was recorded."""
    damaged: list[str] = []
    files = shard_files(folder)
    for done, file in enumerate(files, start=1):
        content = file.with_suffix(".bin")
        try:
            with content.open("rb") as stream:
                is_whole = (
                    hashlib.file_digest(stream, "sha256").hexdigest() == read_header(file)["sha256"]
                )
        except (OSError, UserError):
            is_whole = False
        if not is_whole:
            damaged.append(content.name)
        progress(done, len(files))
    return damaged


class CachedVideo:
    """A video in the cache, with the interface of ``sampling.Reader``.

    Its shard is mapped into memory, so the processes of a machine share the pages.

    Raises:
        BrokenVideo: the video gave no frames when it was packed.
    """

    def __init__(self, index: Index, video: Video) -> None:
        shard, self.entry = index.entries[video.name]
        self.path = video.path
        if self.entry.broken:
            raise BrokenVideo(video.path, self.entry.broken)
        self.packing = index.packing
        self.file = index.folder / f"{shard:05}.bin"
        self.content = _mapped(self.file)
        # Little-endian in the file, so that machines of either byte order can share a cache.
        end = self.entry.ends_at + BYTES_PER_END * self.entry.num_frames
        self.ends = np.frombuffer(self.content[self.entry.ends_at : end], dtype="<i8")

    def __enter__(self) -> CachedVideo:
        return self

    def __exit__(self, *_: object) -> None:
        # The mapping stays open: _mapped() shares it with the other videos of the shard.
        pass

    def __len__(self) -> int:
        return self.entry.num_frames

    @property
    def fps(self) -> float | None:
        """The video's frames per second."""
        return self.entry.fps

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers, ``[len(indices), H, W, 3]``.

        Raises:
            BrokenVideo: the shard is damaged.
        """
        # Indices past the end repeat the last frame, as in sampling.Reader.
        last = len(self) - 1
        wanted = [min(index, last) for index in indices]
        try:
            if self.packing.format == "raw":
                return self._raw_frames()[wanted]
            return np.stack([self._decoded_frame(index) for index in wanted])
        except (RuntimeError, ValueError, IndexError) as error:
            raise BrokenVideo(
                self.path, f"{self.file} is damaged ({error}): mar data pack --verify"
            ) from None

    def _raw_frames(self) -> Frames:
        """Return all frames as a view of the mapped file; only those that are used are read."""
        part = self.content[self.entry.start : int(self.ends[-1])]
        return part.reshape(len(self), self.entry.height, self.entry.width, 3)

    def _decoded_frame(self, index: int) -> Frames:
        if index:
            start = int(self.ends[index - 1])
        else:
            start = self.entry.start
        part = self.content[start : int(self.ends[index])]
        # Imported here: a raw cache needs no torchvision. The copy is needed because the mapping is
        # read-only, and PyTorch has no read-only tensors.
        from torchvision.io import decode_jpeg

        decoded: Any = decode_jpeg(torch.from_numpy(np.array(part)))
        return decoded.permute(1, 2, 0).numpy()


def check(data: DataConfig, videos: Sequence[Video]) -> None:
    """Raise a UserError unless ``open_video`` can read these videos as they are now."""
    if data.cache_folder:
        load_index(data.cache_folder).check(videos)
    else:
        check_decoder(data.decoder)


def is_packed(data: DataConfig, video: Video) -> bool:
    """Whether the data have a frame cache, and it has the video."""
    return data.cache_folder is not None and video.name in load_index(data.cache_folder).entries


def is_unchanged(data: DataConfig, video: Video) -> bool:
    """Whether the data have no frame cache, or it has the video as its file is now."""
    return data.cache_folder is None or load_index(data.cache_folder).is_fresh(video)


def open_video(data: DataConfig, video: Video) -> Reader | CachedVideo:
    """Return a reader of the video: from the cache if there is one, else of its file.

    Raises:
        BrokenVideo: no frames can be read, or the cache does not have the video.
    """
    if data.cache_folder:
        if not is_packed(data, video):
            raise BrokenVideo(video.path, f"it is not in the frame cache {data.cache_folder}")
        return CachedVideo(load_index(data.cache_folder), video)
    return Reader(video.path, data.decoder)


# The limit bounds the number of mappings that a process keeps.
@lru_cache(maxsize=256)
def _mapped(file: Path) -> npt.NDArray[np.uint8]:
    # As a plain array: NumPy's memmap runs Python code each time that it is cut.
    return np.memmap(file, dtype=np.uint8, mode="r").view(np.ndarray)


def _pack_shard(folder: Path, packing: Packing, decoder: str, part: tuple[int, list[Video]]) -> int:
    """Write one shard: the frames, their end offsets, then the header that makes it valid.

    Returns the number of its videos.
    """
    number, videos = part
    entries: list[Entry] = []
    ends: list[int] = []
    unfinished = folder / f".{number:05}.bin"
    try:
        with unfinished.open("w+b") as file:
            for video in videos:
                entry, video_ends = _packed(file, video, packing, decoder)
                # Relative to the table of ends, whose offset is known only after the last frame.
                entries.append(replace(entry, ends_at=len(ends) * BYTES_PER_END))
                ends += video_ends
            offset = file.tell()
            file.write(np.array(ends, dtype="<i8").tobytes())
            size = file.tell()
            # On the disk before the header is written: after a power failure a header must not
            # stand for content that was lost.
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        unfinished.rename(folder / f"{number:05}.bin")
        placed = [plain(replace(entry, ends_at=offset + entry.ends_at)) for entry in entries]
        header = {"sha256": digest, "bytes": size, "entries": placed}
        # Last: a shard without this file does not exist for a reader, and is packed again.
        atomic_write(folder / f"{number:05}.json", json.dumps(header).encode())
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise Failure(
            f"could not write {folder}: {error.strerror or error}; complete shards are kept"
        ) from None
    return len(videos)


def _packed(file: Any, video: Video, packing: Packing, decoder: str) -> tuple[Entry, list[int]]:
    """Write one video's frames; return its entry and the offset at which each frame ends."""
    size = -1
    if is_video(video.path):
        size = video_bytes(video.path)
    entry = Entry(video.name, size, start=file.tell())
    ends: list[int] = []
    try:
        with Reader(video.path, decoder) as reader:
            for frame in (_small(each, packing.short_side) for each in reader):
                file.write(_encoded(frame, packing))
                ends.append(file.tell())
                entry = replace(entry, height=frame.shape[0], width=frame.shape[1], fps=reader.fps)
    # The reason is recorded, so that a trial reports the same error as without a cache.
    except BrokenVideo as broken:
        return Entry(video.name, entry.source_bytes, broken=broken.reason), []
    return replace(entry, num_frames=len(ends)), ends


def _small(frame: Frames, short_side: int | None) -> Frames:
    """Return a frame whose short side is at most ``short_side`` (bilinear, antialiased)."""
    if short_side is None:
        return frame
    height, width = frame.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1:
        return frame
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
    return (
        F.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0]
        .permute(1, 2, 0)
        .numpy()
    )


def _encoded(frame: Frames, packing: Packing) -> bytes:
    if packing.format == "raw":
        return frame.tobytes()
    from torchvision.io import encode_jpeg

    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).contiguous()
    encoded: Any = encode_jpeg(pixels, quality=packing.quality)
    return encoded.numpy().tobytes()
