"""Pixel values: from the uint8 of a video to floats, and ImageNet's statistics."""

from __future__ import annotations

from jaxtyping import Float, UInt8
from torch import Tensor


def to_pixels(clips: UInt8[Tensor, "B T H W C"]) -> Float[Tensor, "B C T H W"]:
    """Return pixel values from 0 to 1.

    In memory frames stay before channels, and each channel is a plane of its own: what augmentation
    and patches read is in one piece then. It is the uint8 values that are rearranged, a quarter of
    the floats' size.
    """
    planes = clips.permute(0, 1, 4, 2, 3).contiguous()
    return (planes.float() / 255).transpose(1, 2)


# By channel (red, green, blue), of pixel values from 0 to 1. VideoMAE and the release normalise
# with these numbers, so their weights expect them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
