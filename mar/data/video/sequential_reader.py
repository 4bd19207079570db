"""Decodes a video from its first packet to its last with PyAV, as a player does.

Frame n is the n-th frame that a player shows, for every file that FFmpeg can read. This is slower
than seeking, so ``mar.data.decoders`` uses it where decord and torchcodec are not exact. Imports
PyAV only when it is called.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mar.data.video.container import MOST_PIXELS, open_container
from mar.data.video.paths import is_file
from mar.safe_text import printable

Frames = npt.NDArray[np.uint8]
"""uint8 frames, ``[T, H, W, 3]``, RGB."""
_KEPT_BYTES = 256 * 2**20
"""Bytes of decoded frames that are kept for one file; the frames of a larger file are decoded
again for each request."""
_BYTES_PER_PIXEL = 3
"""Upper bound for a decoded frame of 8 bits: 1.5 bytes a pixel in 4:2:0, 3 in 4:4:4."""
_TOO_LARGE = f"at most {MOST_PIXELS} are read"


class BrokenVideo(Exception):
    """A file from which no frames can be read; the message names the file and the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        # Loader processes send this error by pickle, which calls __init__ with these arguments.
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.reason}")


@dataclass(frozen=True)
class SequentialReader:
    """A file that PyAV has decoded once, from the front.

    Its frames are kept in memory only where they take at most ``_KEPT_BYTES``. They are kept as
    they were decoded: most are never requested, and need no conversion to RGB.
    """

    path: Path
    length: int
    fps: float | None
    kept: list[Any] | None
    name: str = "pyav"

    @classmethod
    def of(cls, path: Path) -> SequentialReader:
        """Decode a file.

        Raises:
            BrokenVideo: it has no frame.
        """
        kept: list[Any] = []
        properties: dict[str, float] = {}
        length = 0
        held_bytes = 0
        for frame in iter_frames(path, properties):
            length += 1
            held_bytes += frame.width * frame.height * _BYTES_PER_PIXEL
            if held_bytes <= _KEPT_BYTES:
                kept.append(frame)
            else:
                # A long video would take gigabytes: now the frames are only counted.
                kept.clear()
        return cls(path, length, properties.get("fps"), kept if len(kept) == length else None)

    def __len__(self) -> int:
        return self.length

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers.

        Raises:
            BrokenVideo: the file has fewer frames than when it was opened.
        """
        if self.kept is not None:
            chosen = {index: pixels_of(self.kept[index]) for index in set(indices)}
        else:
            wanted = set(indices)
            chosen = {
                index: pixels_of(frame)
                for index, frame in enumerate(iter_frames(self.path))
                if index in wanted
            }
            if len(chosen) < len(wanted):
                raise BrokenVideo(self.path, "it lost frames while it was read: was it replaced?")
        # An index may occur several times: a video shorter than a clip repeats frames.
        return np.stack([chosen[index] for index in indices])


def iter_frames(path: Path, properties: dict[str, float] | None = None) -> Iterator[Any]:
    """Yield PyAV's frames as a player shows them, in the decoder's order; skip bad packets.

    If the frame size changes in the middle of a file, later frames are scaled to the size of the
    first, as in a player's window.

    If ``properties`` is given, its ``fps`` is set to the frame rate that the file states.

    Raises:
        BrokenVideo: there is no frame, or the disk failed.
    """
    if not is_file(path):
        raise BrokenVideo(path, "no such file")
    from av.error import FFmpegError

    _silence_ffmpeg()
    size: tuple[int, int] | None = None
    try:
        with open_container(path) as container:
            stream = main_stream(container)
            if stream is None:
                raise BrokenVideo(path, "no video stream in it")
            context = stream.codec_context
            # Checked before decoding: a header can state a frame that does not fit into memory.
            if context.width * context.height > MOST_PIXELS:
                raise BrokenVideo(
                    path, f"frames of {context.width} × {context.height} pixels: {_TOO_LARGE}"
                )
            # The size may also grow in the middle of a file; FFmpeg then refuses the packets.
            context.options = {"max_pixels": str(MOST_PIXELS)}
            if properties is not None and stream.average_rate:
                properties["fps"] = float(stream.average_rate)
            for packet in container.demux(stream):
                try:
                    decoded = packet.decode()
                except FFmpegError:
                    continue
                # Not sorted by pts: in avi files with packed B-frames the timestamps are
                # scrambled, and only the decoder's own order is right.
                for frame in decoded:
                    size = size or (frame.width, frame.height)
                    if (frame.width, frame.height) != size:
                        frame = frame.reformat(width=size[0], height=size[1])
                    yield frame
    except (OSError, FFmpegError, ValueError) as error:
        # Damage ends a file early, and the frames before it are valid; but a failing disk must
        # not pass for a shorter video.
        if size is None or isinstance(error, OSError):
            raise BrokenVideo(path, f"not a video that can be decoded ({_reason(error)})") from None
    if size is None:
        raise BrokenVideo(path, "no frame could be decoded")


def main_stream(container: Any) -> Any:
    """Return the video stream that a player shows: no cover picture, a default one, the largest."""
    from av.stream import Disposition

    # PyAV gives a stream no codec context if FFmpeg does not know its codec.
    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None
        and not stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails)
    ]
    return max(streams, key=_preference, default=None)


def _preference(stream: Any) -> tuple[bool, bool, int]:
    """Return a sort key: the greatest is the stream that a player shows."""
    from av.stream import Disposition

    is_default = bool(stream.disposition & Disposition.default)
    return is_default, stream.frames != 1, stream.width * stream.height


def pixels_of(frame: Any) -> Frames:
    """Return PyAV's frame as RGB, rotated as its display matrix says."""
    from av.video.reformatter import VideoReformatter

    # A new converter for each frame would take five times as long as converting a small frame.
    if not hasattr(_converter, "reformatter"):
        _converter.reformatter = VideoReformatter()
    converted: Any = _converter.reformatter.reformat(frame, format="rgb24")
    # decord and torchcodec apply the rotation themselves; PyAV only reports it, in degrees.
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.rot90(converted.to_ndarray(), quarter_turns)


_converter = threading.local()
"""Each thread's converter to RGB."""


def _silence_ffmpeg() -> None:
    """Stop FFmpeg from printing about a damaged file: BrokenVideo reports it once."""
    import av.logging

    av.logging.set_level(None)


def _reason(error: Exception) -> str:
    """Return FFmpeg's message without the file's name, which BrokenVideo gives already."""
    return str(getattr(error, "strerror", None) or error)
