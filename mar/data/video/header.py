"""Estimates the size of a video's frames from the file's header, without decoding a frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mar.data.video.container import open_container
from mar.data.video.sequential_reader import main_stream

_BYTES_PER_PIXEL = 3
_USUAL_FPS = 25.0
"""Frames per second, where the header states no rate."""


def stated_frame_bytes(path: Path) -> int | None:
    """Return the bytes of all frames as RGB; None: the file cannot be opened or states nothing."""
    from av.error import FFmpegError

    try:
        with open_container(path) as container:
            # The first video stream need not be the main one: it may be a cover picture.
            stream: Any = main_stream(container)
            if stream is None:
                return None
            num_frames = stream.frames or _frames_of_duration(container, stream)
            return round(num_frames * stream.width * stream.height * _BYTES_PER_PIXEL)
    except (OSError, ValueError, FFmpegError):
        return None


def _frames_of_duration(container: Any, stream: Any) -> float:
    """Return the frames of a container that does not count them (Matroska, MPEG transport)."""
    import av

    seconds = 0.0
    if stream.duration is not None and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    # Matroska states one duration, the container's; PyAV gives it in units of 1 / av.time_base s.
    elif container.duration is not None:
        seconds = container.duration / av.time_base
    return seconds * float(stream.average_rate or _USUAL_FPS)
