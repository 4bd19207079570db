"""From a video file to the frames of a clip: an opened video, and which of its frames to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mar.config.schema import ClipConfig
from mar.data.decoders import Decoder, open_with
from mar.data.sequential_reader import Frames, SequentialReader, iter_frames, pixels_of

_FRAMES_AT_ONCE = 64
_IMPLAUSIBLE_FPS = 1000.0
"""flv and mkv may state this or more; then nothing is known."""


class Reader:
    """One opened video: its length, and any of its frames. Close it by leaving the ``with`` block.

    A header may promise more frames than there are: what cannot be reached repeats the last frame
    that can.

    Raises:
        BrokenVideo: no decoder found a frame.
    """

    def __init__(self, path: Path, decoder: str = "auto") -> None:
        self.path = path
        self._opened: Decoder | None = open_with(decoder, path)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened = None  # decord frees its decoder and its thread with the object

    @property
    def _decoder(self) -> Decoder:
        assert self._opened is not None, "closed"
        return self._opened

    def __len__(self) -> int:
        return len(self._decoder)

    @property
    def decoder(self) -> str:
        """Who decodes it."""
        return self._decoder.name

    def __iter__(self) -> Iterator[Frames]:
        """Yield all frames in order, going through the file once."""
        index = 0
        while index < len(self):
            if isinstance(self._decoder, SequentialReader) and self._decoder.kept is None:
                yield from (
                    pixels_of(frame)
                    for number, frame in enumerate(iter_frames(self.path))
                    if number >= index
                )
                return
            part = self.frames(range(index, min(index + _FRAMES_AT_ONCE, len(self))))
            yield from part
            index += len(part)

    @property
    def fps(self) -> float | None:
        """Frames a second on average, as the file says; none: it does not."""
        rate = self._decoder.fps
        if rate and 0 < rate < _IMPLAUSIBLE_FPS:
            return float(rate)
        return None

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers, ``[len(indices), H, W, 3]``."""
        if not isinstance(self._decoder, SequentialReader):
            try:
                return self._decoder.frames(indices)
            except (
                Exception
            ):  # decord raises its own DECORDError and, on odd files, bare RuntimeErrors
                self._opened = SequentialReader.of(self.path)
        last = len(self) - 1
        return self._decoder.frames([min(index, last) for index in indices])


def training_frames(
    clip: ClipConfig, num_frames: int, fps: float | None, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw T frame numbers.

    One from each of T segments, or T from a random start, ``stride`` apart.
    """
    if clip.sampling == "dense":
        if clip.fps and fps:
            span = _converted_span(clip, fps)
            return _converted(clip, num_frames, span, rng.uniform(0, max(num_frames - span, 0.0)))
        span = (clip.frames - 1) * clip.stride + 1
        start = int(rng.integers(max(num_frames - span, 0) + 1))
        return np.minimum(start + clip.stride * np.arange(clip.frames), num_frames - 1)
    edges = np.linspace(0, num_frames, clip.frames + 1)
    drawn = edges[:-1] + rng.random(clip.frames) * np.diff(edges)
    if clip.round_frames:
        drawn = drawn.round()
    return np.minimum(drawn.astype(np.int64), num_frames - 1)


def evaluation_frames(
    clip: ClipConfig,
    num_frames: int,
    fps: float | None,
    num_clips: int,
    segment_frames: str = "even",
) -> list[npt.NDArray[np.int64]]:
    """Return the frame numbers of each test clip.

    They are spread evenly over the video, or over each segment.
    """
    if segment_frames == "videomae":
        return _videomae_frames(clip, num_frames, num_clips)
    if clip.sampling == "dense":
        if clip.fps and fps:
            span = _converted_span(clip, fps)
            room = max(num_frames - span, 0.0)
            if num_clips > 1:
                firsts = np.floor(room / (num_clips - 1)) * np.arange(num_clips)
            else:
                firsts = [room / 2]
            return [_converted(clip, num_frames, span, float(first)) for first in firsts]
        span = (clip.frames - 1) * clip.stride + 1
        room = max(num_frames - span, 0)
        if num_clips > 1:
            starts = np.linspace(0, room, num_clips).astype(np.int64)
        else:
            starts = np.array([room // 2])
        return [
            np.minimum(start + clip.stride * np.arange(clip.frames), num_frames - 1)
            for start in starts
        ]
    edges = np.linspace(0, num_frames, clip.frames + 1)
    parts = (np.arange(num_clips) + 0.5) / num_clips
    if segment_frames == "ends" and num_clips > 1:
        parts = np.linspace(0, 1, num_clips)
        return [_within((edges[:-1] + part * np.diff(edges)).round(), num_frames) for part in parts]
    return [_within(edges[:-1] + part * np.diff(edges), num_frames) for part in parts]


def _videomae_frames(
    clip: ClipConfig, num_frames: int, num_clips: int
) -> list[npt.NDArray[np.int64]]:
    """Return the frame numbers of VideoMAE's own test.

    With ``dense``: of every ``stride``-th frame of the video T neighbours, from starts that are
    spread evenly and rounded down. With ``segments``: the beginnings and the middles of T equal
    segments, in order; clip c has every ``num_clips``-th of these 2 T from the c-th on, so that
    with its two clips each frame is seen once.
    """
    if clip.sampling == "dense":
        strided = np.arange(0, num_frames, clip.stride)
        step = max((len(strided) - clip.frames) / max(num_clips - 1, 1), 0)
        starts = [int(number * step) for number in range(num_clips)]
        chosen = [np.minimum(start + np.arange(clip.frames), len(strided) - 1) for start in starts]
        return [strided[each] for each in chosen]
    tick = num_frames / clip.frames
    positions = tick * np.arange(clip.frames)
    both = np.sort(np.floor(np.concatenate([positions, positions + tick / 2])))
    return [
        _within(both[number::num_clips][: clip.frames], num_frames) for number in range(num_clips)
    ]


def frames_wanted(clip: ClipConfig, fps: float | None) -> int:
    """Return how many frames a video must have for a clip's to be different ones."""
    if clip.sampling == "segments":
        return clip.frames
    if clip.fps and fps:
        return round(_converted_span(clip, fps))
    return (clip.frames - 1) * clip.stride + 1


def _converted_span(clip: ClipConfig, fps: float) -> float:
    """Return how many of the video's frames a clip spans, at its own frame rate."""
    assert clip.fps
    return clip.frames * clip.stride * fps / clip.fps


def _converted(
    clip: ClipConfig, num_frames: int, span: float, start: float
) -> npt.NDArray[np.int64]:
    return _within(np.linspace(start, start + span - 1, clip.frames), num_frames)


def _within(positions: npt.NDArray[np.float64], num_frames: int) -> npt.NDArray[np.int64]:
    return np.clip(positions.astype(np.int64), 0, num_frames - 1)
