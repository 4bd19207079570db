"""Reads an opened video, and chooses which of its frames a clip has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mar.config.input_settings import ClipConfig
from mar.data.decoders import Decoder, open_with
from mar.data.video.image_folder import ImageFolder
from mar.data.video.sequential_reader import Frames, SequentialReader, iter_frames, pixels_of

_FRAMES_AT_ONCE = 64
"""Frames that are in memory at once as RGB when a whole video is read."""
_IMPLAUSIBLE_FPS = 1000.0
"""Frames per second. flv and mkv files may state this rate or more; then the rate is unknown."""


class Reader:
    """One opened video: its length, and any of its frames; leaving the ``with`` block closes it.

    A header may state more frames than the file has: frames past the end repeat the last one.

    Raises:
        BrokenVideo: no decoder found a frame.
    """

    def __init__(self, path: Path, decoder: str = "auto") -> None:
        self.path = path
        self._opened: Decoder | None = open_with(decoder, path)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        # decord has no close(): it frees its decoder and its thread with the object.
        self._opened = None

    @property
    def _decoder(self) -> Decoder:
        assert self._opened is not None, "closed"
        return self._opened

    def __len__(self) -> int:
        return len(self._decoder)

    @property
    def decoder(self) -> str:
        """The name of the decoder that reads it."""
        return self._decoder.name

    def __iter__(self) -> Iterator[Frames]:
        """Yield all frames in order, decoding the file once."""
        index = 0
        # The decoder and the length are asked for in each round: frames() may have changed to PyAV.
        while index < len(self):
            # A long file whose frames are not kept would be decoded anew for every part.
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
        """Average frames per second, as the file states; None: unknown."""
        rate = self._decoder.fps
        if rate and 0 < rate < _IMPLAUSIBLE_FPS:
            return float(rate)
        return None

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers, ``[len(indices), H, W, 3]``."""
        # Nothing takes over from the two that never seek.
        if not isinstance(self._decoder, SequentialReader | ImageFolder):
            # decord raises DECORDError and, on unusual files, RuntimeError. One bad packet makes it
            # fail for the whole file, where PyAV still reads the other frames.
            try:
                return self._decoder.frames(indices)
            except Exception:
                self._opened = SequentialReader.of(self.path)
        last = len(self) - 1
        return self._decoder.frames([min(index, last) for index in indices])


def training_frames(
    clip: ClipConfig, num_frames: int, fps: float | None, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw T frame numbers for a training clip.

    ``segments``: one from each of T equal segments. ``dense``: from a random start, ``stride``
    apart. Numbers past the end of a short video repeat its last frame.
    """
    if clip.sampling == "dense":
        # A file that states no frame rate cannot be converted; its frames are taken as they are.
        if clip.fps and fps:
            span = _converted_span(clip, fps)
            return _converted(clip, num_frames, span, rng.uniform(0, max(num_frames - span, 0.0)))
        span = (clip.frames - 1) * clip.stride + 1
        start = int(rng.integers(max(num_frames - span, 0) + 1))
        return np.minimum(start + clip.stride * np.arange(clip.frames), num_frames - 1)
    edges = np.linspace(0, num_frames, clip.frames + 1)
    # Segments have fractional edges, so a video of any length has T of them.
    drawn = edges[:-1] + rng.random(clip.frames) * np.diff(edges)
    # The release rounds; rounding can reach num_frames, hence the minimum.
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

    With ``dense`` the clips are spread evenly over the video, with ``segments`` their frames over
    each segment.
    """
    if segment_frames == "videomae":
        return _videomae_frames(clip, num_frames, num_clips)
    if clip.sampling == "dense":
        if clip.fps and fps:
            span = _converted_span(clip, fps)
            # The release rounds the distance between clips down, so the last may end early.
            room = max(num_frames - span, 0.0)
            if num_clips > 1:
                firsts = np.floor(room / (num_clips - 1)) * np.arange(num_clips)
            else:
                firsts = [room / 2]
            return [_converted(clip, num_frames, span, float(first)) for first in firsts]
        # A single clip is taken from the middle.
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
    # Each clip takes the frames at one relative position of all segments.
    parts = (np.arange(num_clips) + 0.5) / num_clips
    if segment_frames == "ends" and num_clips > 1:
        parts = np.linspace(0, 1, num_clips)
        return [_within((edges[:-1] + part * np.diff(edges)).round(), num_frames) for part in parts]
    return [_within(edges[:-1] + part * np.diff(edges), num_frames) for part in parts]


def _videomae_frames(
    clip: ClipConfig, num_frames: int, num_clips: int
) -> list[npt.NDArray[np.int64]]:
    """Return the frame numbers of VideoMAE's own test.

    With ``dense``, every ``stride``-th frame of the video is kept, and each clip has T consecutive
    ones of these; the starts are spread evenly and rounded down. With ``segments``, the first clip
    has the beginnings of T equal segments and the second their middles; there are no more than two
    clips (``EvaluationConfig`` refuses more).
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
    # In steps of two for a single clip too: half of the 2 T positions would be half of the video.
    return [_within(both[number::2], num_frames) for number in range(num_clips)]


def frames_wanted(clip: ClipConfig, fps: float | None) -> int:
    """Return how many frames a video must have so that a clip repeats none."""
    if clip.sampling == "segments":
        return clip.frames
    if clip.fps and fps:
        return round(_converted_span(clip, fps))
    return (clip.frames - 1) * clip.stride + 1


def _converted_span(clip: ClipConfig, fps: float) -> float:
    """Return how many of the video's frames a clip spans, at the video's own frame rate."""
    assert clip.fps
    return clip.frames * clip.stride * fps / clip.fps


def _converted(
    clip: ClipConfig, num_frames: int, span: float, start: float
) -> npt.NDArray[np.int64]:
    return _within(np.linspace(start, start + span - 1, clip.frames), num_frames)


def _within(positions: npt.NDArray[np.float64], num_frames: int) -> npt.NDArray[np.int64]:
    # astype rounds down; a short video repeats its last frame.
    return np.clip(positions.astype(np.int64), 0, num_frames - 1)
