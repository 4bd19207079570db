"""RandAugment's policies in timm's notation. Imports no torch: settings are checked without it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

MAX_MAGNITUDE = 10.0
"""Of RandAugment, on timm's scale."""
_RANDAUGMENT = re.compile(r"rand-m(\d+(?:\.\d+)?)(?:-n(\d+))?(?:-mstd(\d+(?:\.\d+)?))?-inc1")


@dataclass(frozen=True)
class RandAugmentPolicy:
    """What timm's notation says: ``rand-m9-n2-mstd0.5-inc1``."""

    magnitude: float
    operations: int
    """A clip; 2 unless said."""
    deviation: float
    """Standard deviation of the magnitude; 0 unless said."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the policy that ``text`` stands for.

        Raises:
            ValueError: not in the notation.
        """
        match = _RANDAUGMENT.fullmatch(text)
        if not match or float(match.group(1)) > MAX_MAGNITUDE:
            raise ValueError(
                "expected timm's notation, as rand-m9-mstd0.5-inc1 or rand-m7-n4-mstd0.5-inc1"
            )
        return cls(float(match.group(1)), int(match.group(2) or 2), float(match.group(3) or 0))
