"""The constrained types of settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share of a whole, 0 to 1 inclusive."""
MaskRatio = Annotated[float, Field(ge=0.0, lt=1.0)]
"""ρ, the share of tokens hidden; below 1, because something must stay visible."""
Tubelet = tuple[PositiveInt, PositiveInt, PositiveInt]


def _rising(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise ValueError("must go from the smaller to the larger")
    return span


Area = Annotated[tuple[PositiveFloat, Fraction], AfterValidator(_rising)]
"""Shares of an area, from and to."""
Scale = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_rising)]
Grid = tuple[int, int, int]
"""Tokens in time, height and width: (t, h, w)."""
# Bounds that no experiment meets: a setting beyond is a slip, or a damaged file that would exhaust
# the memory.
Width = Annotated[int, Field(gt=0, le=2**15)]
"""Of tokens."""
Depth = Annotated[int, Field(gt=0, le=2**10)]
"""Blocks or layers."""
FrameCount = Annotated[int, Field(gt=0, le=2**13)]
"""Frames of a clip."""
PixelCount = Annotated[int, Field(gt=0, le=2**13)]
"""Of a side of a clip."""
ClassCount = Annotated[int, Field(gt=0, le=10**6)]
