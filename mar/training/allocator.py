"""Lets the C library keep freed memory during a training, and give it back after it."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next use.

    For processes that train on the CPU.

    Elsewise glibc gives every large tensor back to the system, which hands the next one out zeroed,
    page by page: up to half of the time of a step. Does nothing where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**26)


def give_back_freed_memory() -> None:
    """Return to the system what :func:`keep_freed_memory` kept.

    Between trials, and when memory is short.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""Of glibc's malloc.h."""
