"""A video that is a folder of images, one for each frame, as Jester's and many copies of others.

The images are read in the order of the numbers in their names: ``img_2.jpg`` before
``img_10.jpg``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mar.data.video.container import MOST_PIXELS
from mar.data.video.files import is_hidden
from mar.data.video.paths import IMAGE_ENDINGS
from mar.data.video.sequential_reader import BrokenVideo, Frames

_NUMBER = re.compile("([0-9]+)")


class ImageFolder:
    """A folder of images as a video; a frame is decoded when it is asked for.

    Raises:
        BrokenVideo: there is no image in it.
    """

    name = "images"
    fps: float | None = None
    """Images state no frame rate."""

    def __init__(self, path: Path) -> None:
        self.path = path
        names = [each.name for each in path.iterdir() if is_image(each.name)]
        if not names:
            raise BrokenVideo(path, "a folder without images")
        self.names = sorted(names, key=_in_order)

    def __len__(self) -> int:
        return len(self.names)

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers.

        Raises:
            BrokenVideo: an image cannot be read, or has another size than the first one.
        """
        chosen = {index: self._frame(self.names[index]) for index in {*indices}}
        sizes = {frame.shape for frame in chosen.values()}
        if len(sizes) > 1:
            shown = " and ".join(f"{width} × {height}" for height, width, _ in sorted(sizes))
            raise BrokenVideo(self.path, f"images of different sizes: {shown}")
        return np.stack([chosen[index] for index in indices])

    def _frame(self, name: str) -> Frames:
        # Imported here, because most data sets have files.
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.path / name) as image:
                # Checked before decoding: a header can state a size that does not fit into memory.
                if image.width * image.height > MOST_PIXELS:
                    raise BrokenVideo(
                        self.path,
                        f"{name}: {image.width} × {image.height} pixels: at most {MOST_PIXELS} "
                        "are read",
                    )
                return np.asarray(image.convert("RGB"))
        except UnidentifiedImageError:
            raise BrokenVideo(self.path, f"{name}: not an image that can be decoded") from None
        # PIL raises SyntaxError and ValueError too for damaged files.
        except (OSError, SyntaxError, ValueError) as error:
            raise BrokenVideo(self.path, f"{name}: {error}") from None


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image, and not hidden."""
    return name.lower().endswith(IMAGE_ENDINGS) and not is_hidden(name)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key by the numbers in a name, then by its text."""
    # Every second part of a split by numbers is a number.
    parts = _NUMBER.split(name)
    return [(int(part), part) if index % 2 else (0, part) for index, part in enumerate(parts)]
