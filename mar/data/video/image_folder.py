"""A video that is a folder of images, one for each frame, as Jester's and many copies of others.

The images are read in the order of the numbers in their names: ``img_2.jpg`` before
``img_10.jpg``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mar.data.video.container import MOST_PIXELS
from mar.data.video.paths import is_image
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
        try:
            names = [each.name for each in path.iterdir() if is_image(each.name)]
        except OSError as error:
            raise BrokenVideo(path, error.strerror or str(error)) from None
        if not names:
            raise BrokenVideo(path, "a folder without images")
        self.names = sorted(names, key=_in_order)
        # Of the first frame that is read: all others must have its height and width.
        self.shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers.

        Raises:
            BrokenVideo: an image cannot be read, or has another size than others.
        """
        chosen = {index: self._frame(self.names[index]) for index in {*indices}}
        for index, frame in chosen.items():
            self.shape = self.shape or frame.shape
            if frame.shape != self.shape:
                height, width, _ = frame.shape
                other_height, other_width, _ = self.shape
                raise BrokenVideo(
                    self.path,
                    f"{self.names[index]}: {width} × {height} pixels, where another image has "
                    f"{other_width} × {other_height}",
                )
        return np.stack([chosen[index] for index in indices])

    def _frame(self, name: str) -> Frames:
        # Imported here, because most data sets have files.
        from PIL import Image, UnidentifiedImageError

        try:
            with warnings.catch_warnings():
                # PIL warns of sizes that are refused below, by a lower limit.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(self.path / name)
            with image:
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
        # PIL raises SyntaxError and ValueError too for damaged files, and has a limit of its own
        # for the size that a header states.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BrokenVideo(self.path, f"{name}: {error}") from None


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key by the numbers in a name, then by its text."""
    # Every second part of a split by numbers is a number.
    parts = _NUMBER.split(name)
    return [(int(part), part) if index % 2 else (0, part) for index, part in enumerate(parts)]
