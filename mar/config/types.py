"""The constrained types of settings. Imports no torch, because settings are checked without it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share of a whole, 0 to 1 inclusive."""
MaskRatio = Annotated[float, Field(ge=0.0, lt=1.0)]
"""ρ, the share of tokens hidden; below 1, because something must stay visible."""


def _several(value: Any) -> Any:
    """Check a list of ratios; of equal ones, one is enough.

    pydantic's own message for a value that may be a number or a list would speak of both.
    """
    if not isinstance(value, list | tuple):
        return value
    ratios: list[Any] = list(value)
    if not ratios:
        raise ValueError("the list is empty")
    for ratio in ratios:
        is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not is_number or not 0 <= ratio < 1:
            raise ValueError(f"each of a list must be at least 0 and less than 1, not {ratio!r}")
    if len(set(ratios)) == 1:
        return ratios[0]
    return ratios


MaskRatios = Annotated[MaskRatio | tuple[MaskRatio, ...], BeforeValidator(_several)]
"""One ratio, or several."""


def _last(value: Any) -> Any:
    """Take ``{last: N}``, also as a text, for N."""
    if isinstance(value, dict) and list(value) == ["last"]:
        return value["last"]
    if isinstance(value, str) and value.startswith("last:"):
        number = value.removeprefix("last:").strip()
        return int(number) if number.isdecimal() else value
    return value


TrainedBlocks = Annotated[Literal["all", "none"] | PositiveInt, BeforeValidator(_last)]
"""All blocks of an encoder, none, or the last of them."""
Tubelet = tuple[PositiveInt, PositiveInt, PositiveInt]
PretrainedGrid = tuple[PositiveInt, PositiveInt, PositiveInt]
"""Tokens of a clip in time, height and width."""


# pydantic reports the ValueError of a validator with the setting's path before it.
def _rising(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise ValueError("must go from the smaller to the larger")
    return span


Area = Annotated[tuple[PositiveFloat, Fraction], AfterValidator(_rising)]
"""Smallest and largest share of an area; the smallest above 0, the largest at most 1."""
Scale = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_rising)]
"""Smallest and largest ratio."""
Grid = tuple[int, int, int]
"""Tokens in time, height and width: (t, h, w)."""
# No experiment reaches these bounds. A larger value is a mistake, or comes from a damaged file, and
# would exhaust the memory.
Width = Annotated[int, Field(gt=0, le=2**15)]
"""Width of tokens."""
Depth = Annotated[int, Field(gt=0, le=2**10)]
"""Number of blocks or layers."""
FrameCount = Annotated[int, Field(gt=0, le=2**13)]
"""Number of frames of a clip."""
PixelCount = Annotated[int, Field(gt=0, le=2**13)]
"""Pixels of a side of a clip."""
ClassCount = Annotated[int, Field(gt=0, le=10**6)]
