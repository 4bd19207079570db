"""Device profiles: how fast devices train, and what they cost, for plans and budgets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

from mar.errors import UserError
from orchestration.installation import packaged


@dataclass(frozen=True)
class Device:
    """How fast a device trains, and what it costs."""

    name: str
    train_gflops_per_s: float
    """In billions of multiply-adds, as all costs here."""
    source: str
    """Where the figure is from."""
    price_per_h: float | None = None
    """In any currency: it is only printed."""


def device(name: str) -> Device:
    """Return a device's profile: one that ships with mar, or of a user's NAME=GFLOPS_PER_S.

    Raises:
        UserError: no profile has that name, or GFLOPS_PER_S is not a positive number.
    """
    given, _, speed = name.partition("=")
    if speed:
        try:
            gflops_per_s = float(speed)
            # ``float`` also reads "nan", "inf" and negative numbers.
            if not 0 < gflops_per_s < float("inf"):
                raise ValueError
            return Device(given, gflops_per_s, "given on the command line")
        except ValueError:
            raise UserError(f"--device {name}: expected NAME=GFLOPS_PER_S, as mine=50000") from None
    profiles = planning_figures()["devices"]
    if name not in profiles:
        raise UserError(
            f"--device {name}: no such profile ({', '.join(profiles)}); or NAME=GFLOPS_PER_S"
        )
    return Device(name, **profiles[name])


@lru_cache
def planning_figures() -> dict[str, Any]:
    """Return the device profiles and the sizes of the official training splits."""
    # A file of ours, so it is not read with the limits of ``mar.safe_input``.
    return yaml.safe_load(
        (packaged("search_spaces") / "paper" / "planning.yaml").read_text(encoding="utf-8")
    )
