"""Videos whose pixels say their frame's number, made with many encoders and muxers.

A picture has eight blocks, black or white: the number's bits. A frame's number can so be read back
from what a decoder gives, through any compression.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

SIDE = 64
Picture = npt.NDArray[np.uint8]


def picture(number: int, side: int = SIDE) -> Picture:
    """Return a grey picture with eight blocks that are white where the number has a bit."""
    image = np.full((side, side, 3), 128, np.uint8)
    half, quarter = side // 2, side // 4
    for bit in range(8):
        row, column = divmod(bit, 4)
        level = 235 if number >> bit & 1 else 16
        image[row * half : (row + 1) * half, column * quarter : (column + 1) * quarter] = level
    return image


def numbers_of(frames: npt.NDArray[np.uint8]) -> list[int]:
    """Return the numbers that decoded pictures show, ``[n, H, W, 3]``."""
    rows = frames.shape[1] * np.array([1, 3]) // 4
    columns = frames.shape[2] * np.arange(1, 8, 2) // 8
    reach = frames.shape[1] // 16
    values = np.zeros(len(frames), dtype=int)
    for bit in range(8):
        row, column = rows[bit // 4], columns[bit % 4]
        inner = frames[:, row - reach : row + reach, column - reach : column + reach]
        values |= (inner.mean(axis=(1, 2, 3)) > 127).astype(int) << bit
    return values.tolist()


def write_numbered(
    file: Path,
    codec: str,
    options: dict[str, str] | None = None,
    *,
    numbers: Iterable[int] = range(192),
    muxer: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    pixel_format: str = "yuv420p",
    side: int = SIDE,
) -> None:
    """Write pictures of these numbers as a video of 25 frames/s; ``times`` are in 1/1000 s."""
    with av.open(str(file), "w", options=muxer or {}) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(25), options=options or {})
        stream.width = stream.height = side
        stream.pix_fmt = pixel_format
        stream.bit_rate = 1_000_000
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for workdir, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(picture(number, side), format="rgb24")
            if times is not None:
                frame.pts = times[workdir]
                frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def edit(file: Path, parts: Sequence[tuple[float, float | None]]) -> None:
    """Give an mp4 another edit list: for each part how long it is and where it begins, seconds.

    A part that begins nowhere (``None``) shows nothing: what follows is delayed. The file's index
    must be at its end, where FFmpeg writes it.
    """
    content = bytearray(file.read_bytes())
    movie = _box(content, ["moov"])
    header = _box(content, ["moov", "mvhd"])
    track = _box(content, ["moov", "trak"])
    media = _box(content, ["moov", "trak", "mdia", "mdhd"])
    assert movie[1] == len(content), "the index is not at the end"
    movie_scale = struct.unpack(">I", content[header[0] + 20 : header[0] + 24])[0]
    media_scale = struct.unpack(">I", content[media[0] + 20 : media[0] + 24])[0]
    old = next(
        (each for each in _boxes(content, track[0] + 8, track[1]) if each[0] == "edts"), None
    )
    # Frames that are shown in another order than decoded begin late: FFmpeg's own list says how
    # late.
    late = 0
    if old:
        late = max(struct.unpack(">i", content[old[1] + 28 : old[1] + 32])[0], 0)
    body = b""
    for length, begin in parts:
        start = -1 if begin is None else round(begin * media_scale) + late
        body += struct.pack(">IiI", round(length * movie_scale), start, 0x10000)
    inner = struct.pack(">I4sII", 16 + len(body), b"elst", 0, len(parts)) + body
    new = struct.pack(">I4s", 8 + len(inner), b"edts") + inner
    first, last = (old[1], old[2]) if old else (track[0] + 8, track[0] + 8)
    if not old:  # behind the track's header
        first = last = next(
            end for kind, _, end in _boxes(content, track[0] + 8, track[1]) if kind == "tkhd"
        )
    content[first:last] = new
    grown = len(new) - (last - first)
    for start, end in (movie, track):
        content[start : start + 4] = struct.pack(">I", end - start + grown)
    file.write_bytes(content)


def _boxes(content: bytes, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    while start + 8 <= end:
        size, kind = struct.unpack(">I4s", content[start : start + 8])
        yield kind.decode("latin-1"), start, start + size
        start += size


def _box(content: bytes, path: Sequence[str]) -> tuple[int, int]:
    """Return where a box begins and ends."""
    start, end = 0, len(content)
    for depth, kind in enumerate(path):
        inside = start + 8 if depth else 0
        start, end = next((a, b) for name, a, b in _boxes(content, inside, end) if name == kind)
    return start, end
