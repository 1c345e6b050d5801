"""The C library's memory, for work that makes and drops one large tensor after another."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let this process use the memory of dropped tensors again; glibc gives it back to the kernel, which then clears new pages.

    Costs a few hundred MB where sizes differ, and saves most of the system time of a large export. Without glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
