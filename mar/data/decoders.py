"""Decoders of video files: decord, torchcodec and PyAV; what each can be trusted with.

And a probe that one works.

The contract of all of them: frame n is the n-th frame that a player shows.

PyAV goes through a file from its front, as a player does, and keeps the contract for every file it
can read. decord and torchcodec jump to the frames that are wanted, which is faster, and go wrong,
in silence, where a key frame needs earlier frames or a packet is not a frame. What decides is the
stream, not the container and the codec: ``mar.seeking`` reads a file's packets, and only a file in
which jumping is exact is given to one of the two. That is looked at once per file.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mar.data.container import MOST_PIXELS, open_container
from mar.data.seeking import NotSeekable, StreamIndex, index_of
from mar.errors import UserError
from mar.safe_text import printable

Frames = npt.NDArray[np.uint8]
"""uint8 frames, ``[T, H, W, 3]``, RGB."""

_CODECS = {"decord": {"h264", "vp8", "vp9"}, "torchcodec": {"h264", "hevc", "vp8", "vp9", "av1"}}
"""What a decoder that jumps was seen to decode right; decord has no AV1, and reorders HEVC
wrongly."""
_KNOWN_FILES = 2**17
"""Of so many files a process remembers whether a decoder may jump in them."""
_TOLERANCE_S = 2e-3
"""Matroska counts whole milliseconds: times that differ by less are the same."""
_KEPT_BYTES = 256 * 2**20
"""Up to so many bytes a file that is decoded from the front is held; above it is decoded again for
what is wanted."""
_BYTES_PER_PIXEL = 3
"""Of a decoded frame at the most, but for more than 8 bits: 1.5 bytes in 4:2:0, 3 in 4:4:4."""
_TOO_LARGE = f"at most {MOST_PIXELS} are read"
os.environ.setdefault(
    "DECORD_EOF_RETRY_MAX", "4096"
)  # of 0.2 ms: the default, 10240, waits long on damaged files


class BrokenVideo(Exception):
    """A file gave no frames; says which and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.reason}")


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
    """decord: jumps to the key frame before each wanted one. One thread.

    Its memory goes with the object.
    """

    name = "decord"

    def __init__(self, path: Path) -> None:
        decord = importlib.import_module("decord")
        decord.logging.set_level(decord.logging.QUIET)
        self.reader = decord.VideoReader(str(path.absolute()), num_threads=1)
        if not len(self.reader):
            raise BrokenVideo(path, "decord finds no frame in it")
        self.fps: float | None = self.reader.get_avg_fps()

    def __len__(self) -> int:
        return len(self.reader)

    def seconds(self) -> npt.NDArray[np.float64]:
        """Return when each frame is shown."""
        return self.reader.get_frame_timestamp(range(len(self.reader)))[:, 0].astype(np.float64)

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers."""
        return self.reader.get_batch(list(indices)).asnumpy()


class TorchCodec:
    """torchcodec: scans the file's packets once, then jumps. An optional extra.

    It needs FFmpeg's libraries.
    """

    name = "torchcodec"

    def __init__(self, path: Path) -> None:
        decoders = importlib.import_module("torchcodec.decoders")
        self.reader = decoders.VideoDecoder(
            str(path.absolute()), dimension_order="NHWC", num_ffmpeg_threads=1
        )
        self.fps: float | None = self.reader.metadata.average_fps

    def __len__(self) -> int:
        return len(self.reader)

    def seconds(self) -> npt.NDArray[np.float64] | None:
        """Nothing to compare: it scans the packets itself and looks frames up by their times."""
        return None

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers."""
        return self.reader.get_frames_at(list(indices)).data.numpy()


_JUMPING: dict[str, type[Decord] | type[TorchCodec]] = {"torchcodec": TorchCodec, "decord": Decord}
"""The faster first: ``benchmarks/decoders.py``."""


@dataclass(frozen=True)
class SequentialReader:
    """PyAV, once through the file.

    Its frames are kept only where they take less than ``_KEPT_BYTES``.

    They are kept as they were decoded: most are never asked for, and need no conversion to RGB.
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
            BrokenVideo: there is no frame in it.
        """
        kept: list[Any] = []
        properties: dict[str, float] = {}
        length = held_bytes = 0
        for frame in iter_frames(path, properties):
            length += 1
            held_bytes += frame.width * frame.height * _BYTES_PER_PIXEL
            if held_bytes <= _KEPT_BYTES:
                kept.append(frame)
            else:
                kept.clear()
        return cls(path, length, properties.get("fps"), kept if len(kept) == length else None)

    def __len__(self) -> int:
        return self.length

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers."""
        if self.kept is not None:
            chosen = {index: pixels_of(self.kept[index]) for index in set(indices)}
        else:
            wanted = set(indices)
            chosen = {
                index: pixels_of(frame)
                for index, frame in enumerate(iter_frames(self.path))
                if index in wanted
            }
        return np.stack([chosen[index] for index in indices])


def open_with(decoder: str, path: Path) -> Decoder:
    """Open a file with ``auto``, ``decord``, ``torchcodec`` or ``pyav``.

    PyAV has what the chosen one gets wrong.

    Raises:
        BrokenVideo: no frame can be found.
    """
    chosen = fastest_decoder() if decoder == "auto" else decoder
    if chosen != "pyav":
        with suppress(
            Exception
        ):  # decord's DECORDError, torchcodec's RuntimeError: PyAV may know more
            load_index = _open_exactly(chosen, path)
            if load_index:
                return load_index
    return SequentialReader.of(path)


def _open_exactly(decoder: str, path: Path) -> Decord | TorchCodec | None:
    """Open a file with a decoder that jumps.

    None where its frames might be others than asked for.
    """
    state = path.stat()
    file = (decoder, str(path), state.st_ino, state.st_size, state.st_mtime_ns)
    if file not in _is_exact:
        if len(_is_exact) >= _KNOWN_FILES:
            _is_exact.clear()
        _is_exact[file] = False  # also if what follows raises
        try:
            index = index_of(path)
        except NotSeekable:
            return None
        if index.codec not in _CODECS[decoder]:
            return None
        load_index = _JUMPING[decoder](path)
        _is_exact[file] = _agrees(load_index, index)
        return load_index if _is_exact[file] else None
    return _JUMPING[decoder](path) if _is_exact[file] else None


_is_exact: dict[tuple[str, str, int, int, int], bool] = {}
"""Decoder and file, with what tells that the file has changed -> whether the decoder may jump in
it."""


def _agrees(load_index: Decord | TorchCodec, index: StreamIndex) -> bool:
    """Whether a decoder has as many frames as there are packets, each shown when its packet is."""
    if len(load_index) != len(index.seconds):
        return False
    seconds = load_index.seconds()
    if seconds is None:
        return True
    # When the first is shown differs with the version of FFmpeg, and is no matter.
    differences = (seconds - seconds[0]) - (index.seconds - index.seconds[0])
    return bool(np.abs(differences).max() <= _TOLERANCE_S)


def decode_with(decoder: str, path: Path) -> Frames:
    """Return all frames of a video by one decoder, with no other to help.

    Raises:
        BrokenVideo: that decoder cannot.
    """
    if decoder == "pyav":
        return np.stack([pixels_of(frame) for frame in iter_frames(path)])
    try:
        load_index = _JUMPING[decoder](path)
        return load_index.frames(range(len(load_index)))
    except Exception as error:
        raise BrokenVideo(
            path, f"{decoder} cannot decode it, or is not installed ({_first_line(error)})"
        ) from None


@lru_cache
def fastest_decoder() -> str:
    """Return the fastest decoder that works on this machine."""
    return next((decoder for decoder in _JUMPING if not probe_decoder(decoder)), "pyav")


def check(decoder: str) -> None:
    """Raise a UserError if a decoder that was asked for by name does not work here."""
    fault = probe_decoder(decoder) if decoder != "auto" else ""
    if fault:
        raise UserError(
            f"data.decoder: {decoder} does not work here ({fault}); repair it (mar doctor), or "
            "set auto"
        )


@lru_cache
def probe_decoder(decoder: str) -> str:
    """Prove a decoder: write a clip of known brightness, read it back.

    Returns what is wrong, or nothing.

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
    if seen.shape == frames.shape:
        difference = float(np.abs(seen.astype(int) - frames.astype(int)).mean())
    else:
        difference = np.inf
    if difference > 4:
        return f"it decodes wrongly: {seen.shape}, mean difference {difference:.1f}"
    return ""


def write_video(file: Path, frames: Frames, frames_per_s: int = 12, **options: str) -> None:
    """Write frames as an H.264 mp4; ``options`` are x264's."""
    import av

    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(frames_per_s), options=options)
        stream.height = frames.shape[1]
        stream.width = frames.shape[2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def iter_frames(path: Path, properties: dict[str, float] | None = None) -> Iterator[Any]:
    """Yield PyAV's frames as a player shows them, in the decoder's order.

    A bad packet is passed over.

    A file whose size changes in the middle is scaled to its first frame, as a player's window would
    show it.

    ``told`` is filled with what the file says of its frame rate.

    Raises:
        BrokenVideo: there is no frame, or the disk failed.
    """
    if not path.is_file():
        raise BrokenVideo(path, "no such file")
    from av.error import FFmpegError

    _hush()
    size: tuple[int, int] | None = None
    try:
        with open_container(path) as container:
            stream = _main_stream(container)
            if stream is None:
                raise BrokenVideo(path, "no video stream in it")
            context = stream.codec_context
            if context.width * context.height > MOST_PIXELS:
                raise BrokenVideo(
                    path, f"frames of {context.width} × {context.height} pixels: {_TOO_LARGE}"
                )
            context.options = {"max_pixels": str(MOST_PIXELS)}  # a file may grow in the middle
            if properties is not None and stream.average_rate:
                properties["fps"] = float(stream.average_rate)
            for packet in container.demux(stream):
                try:
                    decoded = packet.decode()
                except FFmpegError:
                    continue
                for frame in decoded:
                    size = size or (frame.width, frame.height)
                    if (frame.width, frame.height) != size:
                        frame = frame.reformat(width=size[0], height=size[1])
                    yield frame
    except (OSError, FFmpegError, ValueError) as error:
        if size is None or isinstance(
            error, OSError
        ):  # damage ends a file early; a failing disk is another thing
            raise BrokenVideo(path, f"not a video that can be decoded ({_reason(error)})") from None
    if size is None:
        raise BrokenVideo(path, "no frame could be decoded")


def _main_stream(container: Any) -> Any:
    """Return the video stream that a player shows: no cover picture, a default one, the largest."""
    from av.stream import Disposition

    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None  # none: its codec is not known
        and not stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails)
    ]
    return max(streams, key=_preference, default=None)


def _preference(stream: Any) -> tuple[bool, bool, int]:
    from av.stream import Disposition

    is_default = bool(stream.disposition & Disposition.default)
    return is_default, stream.frames != 1, stream.width * stream.height


def pixels_of(frame: Any) -> Frames:
    """Return the frame as RGB, turned as its display matrix says.

    The others do that by themselves.
    """
    from av.video.reformatter import VideoReformatter

    if not hasattr(_converter, "reformatter"):
        _converter.reformatter = VideoReformatter()
    converted: Any = _converter.reformatter.reformat(frame, format="rgb24")
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.rot90(converted.to_ndarray(), quarter_turns)


_converter = threading.local()
"""Each thread's converter to RGB: to make one takes five times as long as to convert a small
frame."""


def _hush() -> None:
    """What is wrong with a file is said once, by BrokenVideo."""
    import av.logging

    av.logging.set_level(None)


def _reason(error: Exception) -> str:
    """Return FFmpeg's words without the file's name, which is said already."""
    return str(getattr(error, "strerror", None) or error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
