"""Random numbers: each purpose has a stream of its own, and nothing depends on how many were drawn before."""

from __future__ import annotations

import numpy as np


def draw(seed: int, *stream: int) -> np.random.Generator:
    """Return the random numbers of one purpose: ``stream`` says which (epoch, video, …)."""
    return np.random.default_rng([seed, *stream])
