"""From a video file to the frames of a clip: decoding (decord, PyAV) and which frames to take."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mar.config import ClipConfig

Frames = npt.NDArray[np.uint8]
"""uint8 frames, ``[T, H, W, 3]``, RGB."""

_KEPT_BYTES = 256 * 2**20
"""Up to so many bytes a file that is decoded from the front is held; above it is decoded again for what is wanted."""
_FRAMES_AT_ONCE = 64
_IMPLAUSIBLE_FPS = 1000.0
"""flv and mkv may state this or more; then nothing is known."""
os.environ.setdefault("DECORD_EOF_RETRY_MAX", "4096")  # of 0.2 ms: the default, 10240, waits long on damaged files


class BrokenVideo(Exception):
    """A file gave no frames; says which and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Reader:
    """One opened video: its length, and any of its frames. Close it by leaving the ``with`` block.

    decord decodes only what is asked for; a file that it cannot open or read is decoded from the front by PyAV, and
    so is every avi: with packed B-frames decord gives, from one call to the next, other frames than asked for.
    A header may promise more frames than there are: what cannot be reached repeats the last frame that can.

    Raises:
        BrokenVideo: neither decoder found a frame.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._decord: Any = None if _is_avi(path) else _open_decord(path)
        self._decoded: _Decoded | None = _decode(path) if self._decord is None else None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._decord = self._decoded = None  # decord frees its decoder and its thread with the object

    def __len__(self) -> int:
        return len(self._decord) if self._decoded is None else self._decoded.length

    @property
    def decoder(self) -> str:
        """Who decodes it."""
        return "decord" if self._decoded is None else "pyav"

    def __iter__(self) -> Iterator[Frames]:
        """Yield all frames in order, going through the file once."""
        index = 0
        while index < len(self):
            if self._decoded is not None and self._decoded.frames is None:
                yield from (_pixels(frame) for place, frame in enumerate(_walk(self.path)) if place >= index)
                return
            part = self.frames(range(index, min(index + _FRAMES_AT_ONCE, len(self))))
            yield from part
            index += len(part)

    @property
    def fps(self) -> float | None:
        """Frames a second on average, as the file says; none: it does not."""
        rate = self._decord.get_avg_fps() if self._decoded is None else self._decoded.fps
        return float(rate) if rate and 0 < rate < _IMPLAUSIBLE_FPS else None

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers, ``[len(indices), H, W, 3]``."""
        if self._decoded is None:
            try:
                return self._decord.get_batch(list(indices)).asnumpy()
            except Exception:  # decord raises its own DECORDError and, on odd files, bare RuntimeErrors
                self._decoded = _decode(self.path)
        last = self._decoded.length - 1
        wanted = [min(index, last) for index in indices]
        if self._decoded.frames is not None:
            return self._decoded.frames[wanted]
        kept = dict(_chosen(self.path, set(wanted)))
        return np.stack([kept[index] for index in wanted])


def _is_avi(path: Path) -> bool:
    """By its content: an avi may have any name."""
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start[:4] == b"RIFF" and start[8:12] == b"AVI "


def decode_with(decoder: str, path: Path) -> Frames:
    """Return all frames of a video by one decoder, ``decord`` or ``pyav``, with no fallback.

    Raises:
        BrokenVideo: that decoder cannot.
    """
    if decoder == "pyav":
        return _decode_all(path)
    reader = _open_decord(path)
    try:
        return reader.get_batch(list(range(len(reader)))).asnumpy()
    except Exception as error:  # see Reader.frames; None has no get_batch when decord could not even open it
        raise BrokenVideo(path, f"decord cannot decode it, or is not installed ({error})") from None


def _open_decord(path: Path) -> Any:
    try:
        decord = importlib.import_module("decord")
        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(str(path), num_threads=1)
        return reader if len(reader) else None
    except Exception:  # no wheel on this platform, or decord's own error: PyAV is asked next
        return None


@dataclass(frozen=True)
class _Decoded:
    """What a pass over a whole file found."""

    length: int
    fps: float | None
    frames: Frames | None
    """All frames; none where they would take more than ``_KEPT_BYTES``: then another pass takes the chosen ones."""


def _decode(path: Path) -> _Decoded:
    """Decode a file from the front, holding its frames only while they are few."""
    kept: list[Frames] = []
    told: dict[str, float] = {}
    length = held_bytes = 0
    for frame in _walk(path, told):
        length += 1
        held_bytes += frame.width * frame.height * 3
        if held_bytes <= _KEPT_BYTES:
            kept.append(_pixels(frame))
    return _Decoded(length, told.get("fps"), np.stack(kept) if len(kept) == length else None)


def _chosen(path: Path, indices: set[int]) -> Iterator[tuple[int, Frames]]:
    for index, frame in enumerate(_walk(path)):
        if index in indices:
            yield index, _pixels(frame)


def _decode_all(path: Path) -> Frames:
    return np.stack([_pixels(frame) for frame in _walk(path)])


def _walk(path: Path, told: dict[str, float] | None = None) -> Iterator[Any]:
    """Yield PyAV's frames in the decoder's order; a bad packet is passed over, and frames of another size are.

    ``told`` is filled with what the file says of its frame rate.

    Raises:
        BrokenVideo: there is no frame.
    """
    if not path.is_file():
        raise BrokenVideo(path, "no such file")
    import av
    import av.logging
    from av.error import FFmpegError, InvalidDataError

    av.logging.set_level(None)  # what is wrong with a file is said once, by BrokenVideo
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
                except InvalidDataError:
                    continue
                for frame in decoded:
                    size = size or (frame.width, frame.height)
                    if (frame.width, frame.height) == size:
                        yield frame
    except (OSError, FFmpegError, ValueError) as error:
        if size is None:
            raise BrokenVideo(path, f"not a video that can be decoded ({_reason(error)})") from None
    if size is None:
        raise BrokenVideo(path, "no frame could be decoded")


def _reason(error: Exception) -> str:
    """Return FFmpeg's words without the file's name, which is said already."""
    return str(getattr(error, "strerror", None) or error)


def _pixels(frame: Any) -> Frames:
    """Return the frame as RGB, turned as its display matrix says; decord does that by itself."""
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns)


def training_frames(
    clip: ClipConfig, num_frames: int, fps: float | None, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return T frame numbers, drawn: one from each of T segments, or T from a random start, ``stride`` apart."""
    if clip.sampling == "dense":
        if clip.fps and fps:
            span = _converted_span(clip, fps)
            return _converted(clip, num_frames, span, rng.uniform(0, max(num_frames - span, 0.0)))
        span = (clip.frames - 1) * clip.stride + 1
        start = int(rng.integers(max(num_frames - span, 0) + 1))
        return np.minimum(start + clip.stride * np.arange(clip.frames), num_frames - 1)
    edges = np.linspace(0, num_frames, clip.frames + 1)
    drawn = edges[:-1] + rng.random(clip.frames) * np.diff(edges)
    return np.minimum(drawn.astype(np.int64), num_frames - 1)


def evaluation_frames(
    clip: ClipConfig, num_frames: int, fps: float | None, num_clips: int, segment_frames: str = "even"
) -> list[npt.NDArray[np.int64]]:
    """Return the frame numbers of each test clip: spread evenly over the video, or over each segment."""
    if clip.sampling == "dense":
        if clip.fps and fps:
            span = _converted_span(clip, fps)
            room = max(num_frames - span, 0.0)
            firsts = np.floor(room / (num_clips - 1)) * np.arange(num_clips) if num_clips > 1 else [room / 2]
            return [_converted(clip, num_frames, span, float(first)) for first in firsts]
        span = (clip.frames - 1) * clip.stride + 1
        room = max(num_frames - span, 0)
        starts = np.linspace(0, room, num_clips).astype(np.int64) if num_clips > 1 else np.array([room // 2])
        return [np.minimum(start + clip.stride * np.arange(clip.frames), num_frames - 1) for start in starts]
    edges = np.linspace(0, num_frames, clip.frames + 1)
    parts = (np.arange(num_clips) + 0.5) / num_clips
    if segment_frames == "ends" and num_clips > 1:
        parts = np.linspace(0, 1, num_clips)
        return [_within((edges[:-1] + part * np.diff(edges)).round(), num_frames) for part in parts]
    return [_within(edges[:-1] + part * np.diff(edges), num_frames) for part in parts]


def _converted_span(clip: ClipConfig, fps: float) -> float:
    """Return how many of the video's frames a clip spans, at its own frame rate."""
    assert clip.fps
    return clip.frames * clip.stride * fps / clip.fps


def _converted(clip: ClipConfig, num_frames: int, span: float, start: float) -> npt.NDArray[np.int64]:
    return _within(np.linspace(start, start + span - 1, clip.frames), num_frames)


def _within(places: npt.NDArray[np.float64], num_frames: int) -> npt.NDArray[np.int64]:
    return np.clip(places.astype(np.int64), 0, num_frames - 1)
