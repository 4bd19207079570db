"""The video files below a data set's folder, found by their stems."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mar.config.schema import DataConfig
from mar.data import cache_index
from mar.errors import UserError

VIDEO_ENDINGS = (
    ".mp4",
    ".avi",
    ".webm",
    ".mkv",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".flv",
    ".ts",
    ".3gp",
    ".wmv",
)


class VideoFolder:
    """The videos below the video folder (links followed) or in the frame cache, found by name.

    Whatever the sub-folder, the ending and the case of letters; the very case before another.
    """

    def __init__(self, data: DataConfig) -> None:
        self.root = Path(data.root) / data.videos
        if data.cache_folder:
            cached = set(cache_index.load_index(data.cache_folder).entries)
        else:
            cached = set[str]()
        if not self.root.is_dir() and not cached:
            raise UserError(f"data.videos: no folder {self.root}")
        self.by_stem: dict[str, list[str]] = {}
        for path in sorted(cached | set(videos_below(self.root))):
            self.by_stem.setdefault(_stem(path).lower(), []).append(path)

    def find(self, *stems: str, near: str = "", default: str) -> str:
        """Return the path of the first stem that exists; a file in a folder ``near`` wins.

        Raises:
            UserError: several are left.
        """
        for stem in stems:
            found = self.by_stem.get(stem.lower(), [])
            found = [path for path in found if _stem(path) == stem] or found
            found = [path for path in found if near.lower() in _folders(path)] or found
            found = [
                path
                for path in found
                if any(each.startswith(near.lower()) for each in _folders(path))
            ] or found
            if len(found) > 1:
                raise UserError(
                    f"data.videos: {stem} is {' and '.join(found[:3])}, below {self.root}: which "
                    "one is it?"
                )
            if found:
                return found[0]
        return default


def videos_below(root: Path) -> Iterator[str]:
    """Yield the videos below a folder, links followed; what a file system hides is no video."""
    seen: set[str] = set()
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a folder above
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if not is_hidden(name)]
        inside = os.path.relpath(folder, root)
        for name in files:
            is_video = os.path.splitext(name)[1].lower() in VIDEO_ENDINGS  # noqa: PTH122  (a hundred thousand Paths take seconds)
            if is_video and not is_hidden(name):
                yield name if inside == "." else f"{inside}/{name}"


def is_hidden(name: str) -> bool:
    """Whether a system made the file or folder, and not a person.

    As ``.ipynb_checkpoints``, ``@eaDir``, ``._a.mp4``, ``__MACOSX``.
    """
    return name.startswith((".", "@")) or name == "__MACOSX"


def _folders(path: str) -> list[str]:
    return path.lower().split("/")[:-1]


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]  # noqa: PTH119, PTH122


def absolute_path(path: Path) -> Path:
    """Return a path from the root, without ``..``, its links as they are."""
    return Path(os.path.abspath(path))  # noqa: PTH100  (Path.resolve follows links)
