"""Crops and resizes clips, for training and for testing."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from mar.config.schema import TrainingConfig
from mar.data.video.sequential_reader import Frames

Box = tuple[int, int, int, int]
"""Top, left, height and width, pixels."""


def random_box(height: int, width: int, settings: TrainingConfig, rng: np.random.Generator) -> Box:
    """Draw a random-resized crop whose area and logarithm of the aspect ratio are uniform."""
    augment = settings.augment
    low, high = np.log(augment.crop_aspect)
    # A drawn box may not fit into the frame. After ten attempts the crop is not random.
    for _ in range(10):
        area = height * width * rng.uniform(*augment.crop_scale)
        aspect = np.exp(rng.uniform(low, high))
        w = round(float(np.sqrt(area * aspect)))
        h = round(float(np.sqrt(area / aspect)))
        # Video of a few pixels can round to a height or width of 0.
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return _largest_box(height, width, augment.crop_aspect)


def _largest_box(height: int, width: int, aspects: tuple[float, float]) -> Box:
    """Return the largest box in the centre whose aspect ratio is within the limits."""
    # At least one pixel: of a row of pixels, a narrow aspect ratio would leave none.
    w = max(1, min(width, round(height * aspects[1])))
    h = max(1, min(height, round(width / aspects[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_and_resize(
    frames: Frames, box: Box, size: int, antialias: bool = True
) -> UInt8[Tensor, "T size size C"]:
    """Cut ``box`` from every frame and resize it to ``size`` × ``size`` (bilinear), in uint8."""
    top, left, height, width = box
    cut = torch.from_numpy(np.ascontiguousarray(frames[:, top : top + height, left : left + width]))
    # Interpolation to the same size would only cost time.
    if (height, width) == (size, size):
        return cut
    return _resized(cut, (size, size), antialias).contiguous()


def resize_short_side(frames: Frames, size: int, antialias: bool) -> Frames:
    """Resize frames so that the short side has ``size`` pixels.

    The long side keeps the aspect ratio, rounded down.
    """
    height, width = frames.shape[1:3]
    short = min(height, width)
    if height == short:
        new = (size, int(width / short * size))
    else:
        new = (int(height / short * size), size)
    return _resized(torch.from_numpy(np.ascontiguousarray(frames)), new, antialias).numpy()


def _resized(
    frames: UInt8[Tensor, "T H W C"], size: tuple[int, int], antialias: bool
) -> UInt8[Tensor, "T h w C"]:
    """Resize by PyTorch's bilinear interpolation; the result is rounded to uint8."""
    channels_first = frames.permute(0, 3, 1, 2)
    # The release resizes floats without antialiasing, so that case is computed in floats.
    if antialias:
        resized = F.interpolate(channels_first, size=size, mode="bilinear", antialias=True)
    else:
        resized = (
            F.interpolate(channels_first.float(), size=size, mode="bilinear")
            .round()
            .to(torch.uint8)
        )
    return resized.permute(0, 2, 3, 1)


def test_boxes(height: int, width: int, crops: int, crop_from: str = "frame") -> list[Box]:
    """Return the centre square, or three squares along the long side: both ends and the centre.

    The corner of a crop is rounded to the nearest pixel for ``crop_from="frame"``, and down for
    ``"resized"``, as in the release.
    """
    side = min(height, width)
    shares = (0.5,) if crops == 1 else (0.0, 0.5, 1.0)
    whole = math.floor if crop_from == "resized" else round
    return [
        (whole((height - side) * share), whole((width - side) * share), side, side)
        for share in shares
    ]


# pytest would collect the function as a test, because of its name.
test_boxes.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]
