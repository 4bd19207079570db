"""What a video file's header says of its size, without decoding a frame: for estimates alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mar.data.video.container import open_container

_BYTES_PER_PIXEL = 3
_USUAL_FPS = 25.0
"""Taken where the header states no frame rate."""


def stated_frame_bytes(path: Path) -> int | None:
    """Return the bytes of all frames as RGB; None: the file cannot be opened or states nothing."""
    from av.error import FFmpegError

    try:
        with open_container(path) as container:
            stream: Any = max(container.streams.video, key=_num_pixels, default=None)
            if stream is None:
                return None
            num_frames = stream.frames or _frames_of_duration(container, stream)
            return round(num_frames * _num_pixels(stream) * _BYTES_PER_PIXEL)
    except (OSError, ValueError, FFmpegError):
        return None


def _num_pixels(stream: Any) -> int:
    return stream.width * stream.height


def _frames_of_duration(container: Any, stream: Any) -> float:
    """Return the frames of a container that does not count them (Matroska, MPEG transport)."""
    import av

    seconds = 0.0
    if stream.duration is not None and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        seconds = container.duration / av.time_base
    return seconds * float(stream.average_rate or _USUAL_FPS)
