"""Chooses the decoder of a video file (decord, torchcodec or PyAV) and tests that it works.

The contract of all three: frame n is the n-th frame that a player shows.

PyAV decodes a file from its front, as a player does, and keeps the contract for every file that it
can read (``mar.data.video.sequential_reader``). decord and torchcodec seek to the requested frames,
which is faster. But they return wrong frames, without an error, where a key frame needs earlier
frames or a packet is not a frame. This depends on the stream, not on the container and the codec.
So ``mar.data.video.seeking`` reads a file's packets once, and decord or torchcodec opens the file
only if seeking in it is exact.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mar.data.video.image_folder import ImageFolder
from mar.data.video.paths import is_folder
from mar.data.video.seeking import NotSeekable, StreamIndex, index_of
from mar.data.video.sequential_reader import (
    BrokenVideo,
    Frames,
    SequentialReader,
    iter_frames,
    pixels_of,
)
from mar.errors import UserError

_CODECS = {"decord": {"h264", "vp8", "vp9"}, "torchcodec": {"h264", "hevc", "vp8", "vp9", "av1"}}
"""Decoder -> codecs that it decodes correctly; decord has no AV1, and reorders HEVC wrongly."""
_KNOWN_FILES = 2**17
"""Files for which a process remembers whether seeking is exact."""
_TOLERANCE_S = 2e-3
"""Matroska rounds timestamps to milliseconds, so smaller differences mean the same time."""
# Retries of 0.2 ms each. decord's default, 10240, waits 2 s on damaged files; with as few as 64 it
# fails on ordinary videos, which PyAV then decodes ten times slower.
os.environ.setdefault("DECORD_EOF_RETRY_MAX", "4096")


class Decoder(Protocol):
    """An opened file."""

    @property
    def name(self) -> str:
        """The decoder's name, as in ``data.decoder``."""
        ...

    @property
    def fps(self) -> float | None:
        """Frames per second, as the file states."""
        ...

    def __len__(self) -> int: ...

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers; raises any error of the decoder's library."""
        ...


class Decord:
    """decord: seeks to the key frame before each requested frame.

    Its memory is freed with the object.
    """

    name = "decord"

    def __init__(self, path: Path) -> None:
        # Imported here because decord has wheels for Linux on x86-64 only.
        decord = importlib.import_module("decord")
        decord.logging.set_level(decord.logging.QUIET)
        # The path is absolute because FFmpeg takes some relative names for addresses.
        self.reader = decord.VideoReader(str(path.absolute()), num_threads=1)
        if not len(self.reader):
            raise BrokenVideo(path, "decord finds no frame in it")
        self.fps: float | None = self.reader.get_avg_fps()

    def __len__(self) -> int:
        return len(self.reader)

    def seconds(self) -> npt.NDArray[np.float64]:
        """Return the time at which each frame is shown, in seconds."""
        return self.reader.get_frame_timestamp(range(len(self.reader)))[:, 0].astype(np.float64)

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers."""
        return self.reader.get_batch(list(indices)).asnumpy()


class TorchCodec:
    """torchcodec: scans the file's packets once, then seeks.

    It is an optional extra and needs FFmpeg's libraries.
    """

    name = "torchcodec"

    def __init__(self, path: Path) -> None:
        # Imported here because it is optional. ``import torchcodec`` alone succeeds without
        # FFmpeg's libraries; its sub-package ``decoders`` does not.
        decoders = importlib.import_module("torchcodec.decoders")
        self.reader = decoders.VideoDecoder(
            str(path.absolute()), dimension_order="NHWC", num_ffmpeg_threads=1
        )
        self.fps: float | None = self.reader.metadata.average_fps

    def __len__(self) -> int:
        return len(self.reader)

    def seconds(self) -> npt.NDArray[np.float64] | None:
        """Return None: torchcodec scans the packets and finds frames by their timestamps itself."""
        return None

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers."""
        return self.reader.get_frames_at(list(indices)).data.numpy()


_JUMPING: dict[str, type[Decord] | type[TorchCodec]] = {"torchcodec": TorchCodec, "decord": Decord}
"""The decoders that seek, the faster first (measured by ``benchmarks/decoders.py``)."""


def open_with(decoder: str, path: Path) -> Decoder:
    """Open a file with ``auto``, ``decord``, ``torchcodec`` or ``pyav``; or a folder of images.

    PyAV opens the file instead if the chosen decoder fails or would not be exact.

    Raises:
        BrokenVideo: no decoder finds a frame.
    """
    if is_folder(path):
        return ImageFolder(path)
    chosen = fastest_decoder() if decoder == "auto" else decoder
    if chosen != "pyav":
        # decord raises DECORDError, torchcodec RuntimeError; PyAV may still read such a file.
        with suppress(Exception):
            opened = _open_exactly(chosen, path)
            if opened:
                return opened
    return SequentialReader.of(path)


def _open_exactly(decoder: str, path: Path) -> Decord | TorchCodec | None:
    """Open a file with a decoder that seeks; return None where it might return wrong frames."""
    # Inode, size and modification time are part of the key, so a replaced file is checked again.
    state = path.stat()
    file = (decoder, str(path), state.st_ino, state.st_size, state.st_mtime_ns)
    if file not in _is_exact:
        if len(_is_exact) >= _KNOWN_FILES:
            _is_exact.clear()
        # Stored before the check: a file on which the check raises is not checked again.
        _is_exact[file] = False
        try:
            index = index_of(path)
        except NotSeekable:
            return None
        if index.codec not in _CODECS[decoder]:
            return None
        # The decoder builds its own index of the frames, which can still differ from the packets.
        opened = _JUMPING[decoder](path)
        _is_exact[file] = _agrees(opened, index)
        return opened if _is_exact[file] else None
    return _JUMPING[decoder](path) if _is_exact[file] else None


_is_exact: dict[tuple[str, str, int, int, int], bool] = {}
"""Decoder, path, inode, size and modification time -> whether seeking is exact."""


def _agrees(opened: Decord | TorchCodec, index: StreamIndex) -> bool:
    """Return whether a decoder has one frame for each packet, shown at the packet's time."""
    if len(opened) != len(index.seconds):
        return False
    seconds = opened.seconds()
    if seconds is None:
        return True
    # Relative to the first frame, whose own time depends on the version of FFmpeg.
    differences = (seconds - seconds[0]) - (index.seconds - index.seconds[0])
    return bool(np.abs(differences).max() <= _TOLERANCE_S)


def decode_with(decoder: str, path: Path) -> Frames:
    """Return all frames of a video by one decoder; no other decoder takes over if it fails.

    Raises:
        BrokenVideo: that decoder cannot decode the file, or does not work on this machine.
    """
    if decoder == "pyav":
        return np.stack([pixels_of(frame) for frame in iter_frames(path)])
    try:
        opened = _JUMPING[decoder](path)
        return opened.frames(range(len(opened)))
    except Exception as error:
        raise BrokenVideo(
            path, f"{decoder} cannot decode it, or is not installed ({_first_line(error)})"
        ) from None


@lru_cache
def fastest_decoder() -> str:
    """Return the fastest decoder that works on this machine."""
    return next((decoder for decoder in _JUMPING if not probe_decoder(decoder)), "pyav")


def check(decoder: str) -> None:
    """Raise a UserError if a decoder that was selected by name does not work on this machine."""
    fault = probe_decoder(decoder) if decoder != "auto" else ""
    if fault:
        raise UserError(
            f"data.decoder: {decoder} does not work here ({fault}); repair it (mar doctor), or "
            "set auto"
        )


@lru_cache
def probe_decoder(decoder: str) -> str:
    """Test a decoder: write a clip of known brightness and read it back.

    Returns the fault, or an empty string if it works.

    A successful import is not enough: torchcodec can be imported without FFmpeg's libraries.
    """
    # Each frame has its own brightness, so a wrong frame is noticed; decord cannot read 16 × 16.
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
    # A wrong frame is off by 20 or more; the lossy compression alone by less than 4, of 255.
    if difference > 4:
        return f"it decodes wrongly: {seen.shape}, mean difference {difference:.1f}"
    return ""


def write_video(file: Path, frames: Frames, frames_per_s: int = 12, **options: str) -> None:
    """Write frames of even height and width as an H.264 mp4; ``options`` are x264's."""
    import av

    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(frames_per_s), options=options)
        stream.height = frames.shape[1]
        stream.width = frames.shape[2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        # Without a frame, encode() returns the frames that the encoder still holds back.
        container.mux(stream.encode())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
