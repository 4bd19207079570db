"""The C library's allocator: it keeps freed memory during a training and returns it afterwards."""

from __future__ import annotations

import ctypes

# The numbers of mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees, for its next use; for training on the CPU.

    Otherwise glibc returns every large tensor to the system, which hands out the next one zeroed,
    page by page: up to half of the time of a step. Has no effect with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # No separate mapping for a large block: glibc returns a mapping as soon as it is freed.
        mallopt(_M_MMAP_MAX, 0)
        # The heap's free end is returned only above this size, in bytes: the largest that fits.
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        # The heap grows by 64 MiB more than asked for, so it grows less often.
        mallopt(_M_TOP_PAD, 2**26)


def give_back_freed_memory() -> None:
    """Return to the system what :func:`keep_freed_memory` has kept.

    For the time between trials, and when memory is short.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        # 0: keep nothing at the heap's end.
        malloc_trim(0)
