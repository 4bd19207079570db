"""Whether a path is a video, a file or a folder of images, and how large it is."""

from __future__ import annotations

import os
from pathlib import Path

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
"""Endings of the frames of a video that is a folder of images."""


def is_file(path: Path) -> bool:
    """Whether a file is there; a name that no file system can hold is not."""
    try:
        return path.is_file()
    # A name of more than 255 bytes.
    except OSError:
        return False


def is_hidden(name: str) -> bool:
    """Return whether the file or folder was made by a system or program, and not by a person.

    Examples: ``.ipynb_checkpoints``, ``@eaDir``, ``._a.mp4``, ``__MACOSX``.
    """
    return name.startswith((".", "@")) or name == "__MACOSX"


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image, and not hidden."""
    return name.lower().endswith(IMAGE_ENDINGS) and not is_hidden(name)


def is_video(path: Path) -> bool:
    """Whether a file or a folder (of images) is there."""
    return is_file(path) or is_folder(path)


def is_folder(path: Path) -> bool:
    """Whether a folder is there; a name that no file system can hold is not."""
    try:
        return path.is_dir()
    except OSError:
        return False


def video_bytes(path: Path) -> int:
    """Return the size of a video's file, or of a folder's images together, in bytes.

    Raises:
        OSError: there is neither.
    """
    if not path.is_dir():
        return path.stat().st_size
    with os.scandir(path) as entries:
        return sum(entry.stat().st_size for entry in entries if is_image(entry.name))
