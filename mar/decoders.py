"""The decoders of video files: decord, torchcodec and PyAV, what each can be trusted with, and proof that one works.

PyAV goes through a file from its front and is right about every file it can read. decord and torchcodec jump to the
frames that are wanted, which is faster, and go wrong where a container or codec has no exact index: measured on videos
whose pixels say their number, decord gave other frames than asked for from avi, mpg, ts and wmv, and from MPEG-4 part 2
and HEVC with B-frames in any container. So a file goes to one of the two only if its kind is on that one's list.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mar.errors import UserError

Frames = npt.NDArray[np.uint8]
"""uint8 frames, ``[T, H, W, 3]``, RGB."""

_INDEXED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv"}
"""Containers, by FFmpeg's names, whose frames can be found without reading all that comes before."""
_DECORDS_CODECS = {"h264", "vp8", "vp9"}
_KEPT_BYTES = 256 * 2**20
"""Up to so many bytes a file that is decoded from the front is held; above it is decoded again for what is wanted."""
os.environ.setdefault("DECORD_EOF_RETRY_MAX", "4096")  # of 0.2 ms: the default, 10240, waits long on damaged files


class BrokenVideo(Exception):
    """A file gave no frames; says which and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Decoder(Protocol):
    """An opened file."""

    @property
    def name(self) -> str:
        """Who decodes."""
        ...

    @property
    def fps(self) -> float | None:
        """Frames a second, as the file says."""
        ...

    def __len__(self) -> int: ...

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers; raises whatever its library raises."""
        ...


class Decord:
    """decord: jumps to the key frame before each wanted one. One thread; its memory goes with the object."""

    name = "decord"

    def __init__(self, path: Path) -> None:
        decord = importlib.import_module("decord")
        decord.logging.set_level(decord.logging.QUIET)
        self.reader = decord.VideoReader(str(path), num_threads=1)
        if not len(self.reader) or (self.reader.get_frame_timestamp(range(len(self.reader))) < 0).any():
            raise BrokenVideo(path, "its index begins before its first frame")  # an edit list: numbers would be off
        self.fps: float | None = self.reader.get_avg_fps()

    def __len__(self) -> int:
        return len(self.reader)

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers."""
        return self.reader.get_batch(list(indices)).asnumpy()


class TorchCodec:
    """torchcodec: scans the file's packets once, then jumps. An optional extra; it needs FFmpeg's libraries."""

    name = "torchcodec"

    def __init__(self, path: Path) -> None:
        decoders = importlib.import_module("torchcodec.decoders")
        self.reader = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
        self.fps: float | None = self.reader.metadata.average_fps

    def __len__(self) -> int:
        return len(self.reader)

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers."""
        return self.reader.get_frames_at(list(indices)).data.numpy()


_JUMPING: dict[str, type[Decord] | type[TorchCodec]] = {"decord": Decord, "torchcodec": TorchCodec}


@dataclass(frozen=True)
class FromFront:
    """PyAV, once through the file; its frames are kept only where they take less than ``_KEPT_BYTES``."""

    path: Path
    length: int
    fps: float | None
    kept: Frames | None
    name: str = "pyav"

    @classmethod
    def of(cls, path: Path) -> FromFront:
        """Decode a file.

        Raises:
            BrokenVideo: there is no frame in it.
        """
        kept: list[Frames] = []
        told: dict[str, float] = {}
        length = held_bytes = 0
        for frame in walk(path, told):
            length += 1
            held_bytes += frame.width * frame.height * 3
            if held_bytes <= _KEPT_BYTES:
                kept.append(pixels_of(frame))
        return cls(path, length, told.get("fps"), np.stack(kept) if len(kept) == length else None)

    def __len__(self) -> int:
        return self.length

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers."""
        if self.kept is not None:
            return self.kept[list(indices)]
        chosen, wanted = {}, set(indices)
        for index, frame in enumerate(walk(self.path)):
            if index in wanted:
                chosen[index] = pixels_of(frame)
        return np.stack([chosen[index] for index in indices])


def open_with(decoder: str, path: Path) -> Decoder:
    """Open a file with ``auto``, ``decord``, ``torchcodec`` or ``pyav``; PyAV has what the chosen one gets wrong.

    Raises:
        BrokenVideo: no frame can be found.
    """
    chosen = best() if decoder == "auto" else decoder
    if chosen != "pyav" and _can_jump(chosen, path):
        with suppress(Exception):  # decord's DECORDError, torchcodec's RuntimeError: PyAV may know more
            return _JUMPING[chosen](path)
    return FromFront.of(path)


def _can_jump(decoder: str, path: Path) -> bool:
    """Whether a file is of a kind that the decoder gives the right frames of; its header says (about 1 ms)."""
    import av
    from av.error import FFmpegError

    _hush()
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            videos, kind = container.streams.video, container.format.name
            codec = videos[0].codec_context.name if len(videos) == 1 else ""
    except (OSError, FFmpegError, ValueError):
        return False
    return kind in _INDEXED and bool(codec) and (decoder == "torchcodec" or codec in _DECORDS_CODECS)


def decode_with(decoder: str, path: Path) -> Frames:
    """Return all frames of a video by one decoder, with no other to help.

    Raises:
        BrokenVideo: that decoder cannot.
    """
    if decoder == "pyav":
        return np.stack([pixels_of(frame) for frame in walk(path)])
    try:
        opened = _JUMPING[decoder](path)
        return opened.frames(range(len(opened)))
    except Exception as error:
        raise BrokenVideo(path, f"{decoder} cannot decode it, or is not installed ({_first_line(error)})") from None


@lru_cache
def best() -> str:
    """Return the fastest decoder that works on this machine."""
    return next((decoder for decoder in _JUMPING if not fault_of(decoder)), "pyav")


def check(decoder: str) -> None:
    """Raise a UserError if a decoder that was asked for by name does not work here."""
    fault = fault_of(decoder) if decoder != "auto" else ""
    if fault:
        raise UserError(f"data.decoder: {decoder} does not work here ({fault}); repair it (mar doctor), or set auto")


@lru_cache
def fault_of(decoder: str) -> str:
    """Prove a decoder: write a clip of known brightness, read it back. Returns what is wrong, or nothing.

    That it can be imported proves little: decord may lack its wheel, torchcodec FFmpeg's libraries.
    """
    frames = np.stack([np.full((32, 32, 3), level, np.uint8) for level in range(60, 220, 20)])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, frames)
        try:
            seen = decode_with(decoder, file)
        except BrokenVideo as broken:
            return broken.reason
    difference = float(np.abs(seen.astype(int) - frames.astype(int)).mean()) if seen.shape == frames.shape else np.inf
    return f"it decodes wrongly: {seen.shape}, mean difference {difference:.1f}" if difference > 4 else ""


def write_video(file: Path, frames: Frames, frames_per_s: int = 12, **options: str) -> None:
    """Write frames as an H.264 mp4; ``options`` are x264's."""
    import av

    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(frames_per_s), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def walk(path: Path, told: dict[str, float] | None = None) -> Iterator[Any]:
    """Yield PyAV's frames in the decoder's order; a bad packet is passed over, and frames of another size are.

    ``told`` is filled with what the file says of its frame rate.

    Raises:
        BrokenVideo: there is no frame, or the disk failed.
    """
    if not path.is_file():
        raise BrokenVideo(path, "no such file")
    import av
    from av.error import FFmpegError

    _hush()
    size: tuple[int, int] | None = None
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = max(container.streams.video, key=lambda video: video.width * video.height, default=None)
            if stream is None:
                raise BrokenVideo(path, "no video stream in it")
            if told is not None and stream.average_rate:
                told["fps"] = float(stream.average_rate)
            for packet in container.demux(stream):
                try:
                    decoded = packet.decode()
                except FFmpegError:
                    continue
                for frame in decoded:
                    size = size or (frame.width, frame.height)
                    if (frame.width, frame.height) == size:
                        yield frame
    except (OSError, FFmpegError, ValueError) as error:
        if size is None or isinstance(error, OSError):  # damage ends a file early; a failing disk is another thing
            raise BrokenVideo(path, f"not a video that can be decoded ({_reason(error)})") from None
    if size is None:
        raise BrokenVideo(path, "no frame could be decoded")


def pixels_of(frame: Any) -> Frames:
    """Return the frame as RGB, turned as its display matrix says; the others do that by themselves."""
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns)


def _hush() -> None:
    """What is wrong with a file is said once, by BrokenVideo."""
    import av.logging

    av.logging.set_level(None)


def _reason(error: Exception) -> str:
    """Return FFmpeg's words without the file's name, which is said already."""
    return str(getattr(error, "strerror", None) or error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
