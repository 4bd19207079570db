"""Random numbers: every purpose has a stream of its own, named here.

A stream follows from the seed, its purpose and the counters that name what is drawn for (step,
epoch, video, …). Nothing depends on how many numbers were drawn before, on the worker that draws,
or on a resumption.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are for.

    The values are part of every result: never reuse or change one.
    """

    ORDER = 0
    """The permutation of the training videos; counter: epoch."""
    CLIP = 1
    """Which frames and which crop of a video; counters: epoch, video."""
    MASK_AND_FLIP = 2
    """Masks, then horizontal flips, of a batch; counter: step."""
    MIX = 3
    """The mixup or cutmix of a batch; counter: step."""
    DROPOUT = 4
    """Dropout and stochastic depth; counters: step, rank of the worker."""
    RANDAUGMENT = 5
    """RandAugment's operations on a batch of crops; counter: step."""
    ERASING = 6
    """The boxes of random erasing; counter: step."""
    RANDAUGMENT_BEFORE_CROP = 7
    """RandAugment's operations on whole frames; counters: epoch, video, clip."""
    FRAME_SHUFFLE = 8
    """The order of frames in the test with shuffled frames; counter: video."""


def rng(seed: int, stream: Stream, *counters: int) -> np.random.Generator:
    """Return the random numbers of one purpose."""
    return np.random.default_rng([seed, int(stream), *counters])


def rng_seed(seed: int, stream: Stream, *counters: int) -> int:
    """Return a seed of one purpose, for a generator of PyTorch."""
    return int(rng(seed, stream, *counters).integers(2**62))
