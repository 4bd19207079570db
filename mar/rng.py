"""Random numbers: each purpose has its own named stream.

A stream follows from the seed, its purpose and counters (the step, epoch, video, … that the numbers
are for). Nothing depends on how many numbers were drawn before, on which worker draws them, or on
whether a training was resumed.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The purposes of random numbers."""

    # The values go into the seeds of all draws. Never change or reuse one: another value gives
    # other results, and two purposes with the same value draw the same numbers.
    ORDER = 0
    """The permutation of the training videos; counter: epoch."""
    CLIP = 1
    """The frames and the crop of a video; counters: epoch, video."""
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
    RATIO = 9
    """Which of several mask ratios a step has; counter: step."""


def rng(seed: int, stream: Stream, *counters: int) -> np.random.Generator:
    """Return NumPy's generator for one purpose and its counters."""
    # NumPy hashes the whole list into the generator's state (SeedSequence), so that neighbouring
    # counters give independent streams.
    return np.random.default_rng([seed, int(stream), *counters])


def rng_seed(seed: int, stream: Stream, *counters: int) -> int:
    """Return a seed for a PyTorch generator, for one purpose and its counters."""
    # 62 bits fit into the 64-bit integer that torch.Generator.manual_seed takes.
    return int(rng(seed, stream, *counters).integers(2**62))
