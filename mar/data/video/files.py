"""Finds the video files below a data set's folder by their stems (names without endings)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mar.config.input_settings import DataConfig
from mar.data import cache_index
from mar.data.video.paths import is_hidden
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

    Sub-folder, ending and case of letters may differ from the annotations; a name in the same case
    is preferred.
    """

    def __init__(self, data: DataConfig) -> None:
        self.root = Path(data.root) / data.videos
        # The files may have been deleted after they were packed.
        if data.cache_folder:
            cached = set(cache_index.load_index(data.cache_folder).entries)
        else:
            cached = set[str]()
        if not self.root.is_dir() and not cached:
            raise UserError(f"data.videos: no folder {self.root}")
        self.by_stem: dict[str, list[str]] = {}
        # Sorted, because the order of a folder's entries depends on the file system.
        for path in sorted(cached | set(videos_below(self.root))):
            self.by_stem.setdefault(_stem(path).lower(), []).append(path)

    def find(self, *stems: str, near: str = "", default: str) -> str:
        """Return the path of the first stem that exists, or else ``default``.

        If several files have the stem, those in a folder named ``near`` are preferred.

        Raises:
            UserError: several files remain.
        """
        for stem in stems:
            found = self.by_stem.get(stem.lower(), [])
            # Each line narrows the choice, unless it would leave nothing.
            found = [path for path in found if _stem(path) == stem] or found
            # Every name starts with an empty one: without ``near`` no folder is preferred.
            if near:
                found = [path for path in found if near.lower() in _folders(path)] or found
                found = [
                    path
                    for path in found
                    if any(each.startswith(near.lower()) for each in _folders(path))
                ] or found
            if len(found) > 1:
                raise UserError(
                    f"data.videos: several files below {self.root} match {stem}: "
                    f"{', '.join(found[:3])}; keep one of them"
                )
            if found:
                return found[0]
        return default


def videos_below(root: Path) -> Iterator[str]:
    """Yield the videos below a folder as relative paths; follow links, skip hidden files."""
    seen: set[str] = set()
    for folder, below, files in os.walk(root, followlinks=True):
        # A link to a folder above would make os.walk run for ever.
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        # os.walk enters the folders that are left in this list.
        below[:] = [name for name in below if not is_hidden(name)]
        inside = os.path.relpath(folder, root)
        for name in files:
            # Not Path.suffix: a hundred thousand Paths take seconds.
            is_video = os.path.splitext(name)[1].lower() in VIDEO_ENDINGS  # noqa: PTH122
            if is_video and not is_hidden(name):
                yield name if inside == "." else f"{inside}/{name}"


def _folders(path: str) -> list[str]:
    return path.lower().split("/")[:-1]


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]  # noqa: PTH119, PTH122


def absolute_path(path: Path) -> Path:
    """Return an absolute path without ``..``; links are not resolved."""
    return Path(os.path.abspath(path))  # noqa: PTH100  (Path.resolve follows links)
