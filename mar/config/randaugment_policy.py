"""RandAugment's policies in timm's notation. Imports no torch: settings are checked without it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

MAX_MAGNITUDE = 10.0
"""Largest magnitude of RandAugment on timm's scale."""
# Of timm's notation only policies with rising severity (inc1) are implemented; -n and -mstd may be
# left out.
_RANDAUGMENT = re.compile(r"rand-m(\d+(?:\.\d+)?)(?:-n(\d+))?(?:-mstd(\d+(?:\.\d+)?))?-inc1")


@dataclass(frozen=True)
class RandAugmentPolicy:
    """A policy in timm's notation, for example ``rand-m9-n2-mstd0.5-inc1``."""

    magnitude: float
    operations: int
    """Operations for each clip; 2, timm's default, if the text has no ``-n``."""
    deviation: float
    """Standard deviation of the magnitude; 0 if the text has no ``-mstd``."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the policy that ``text`` stands for.

        Raises:
            ValueError: the text is not in this notation, or the magnitude is too large.
        """
        match = _RANDAUGMENT.fullmatch(text)
        if not match or float(match.group(1)) > MAX_MAGNITUDE:
            raise ValueError(
                "expected timm's notation, as rand-m9-mstd0.5-inc1 or rand-m7-n4-mstd0.5-inc1"
            )
        return cls(float(match.group(1)), int(match.group(2) or 2), float(match.group(3) or 0))
