"""Memory: what the C library does with what is freed, and when Python looks for garbage."""

from __future__ import annotations

import contextlib
import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_RARELY = 10**6  # objects
_usual: list[tuple[int, int, int]] = []


def keep_freed_memory() -> None:
    """Let this process use the memory of dropped tensors again; glibc gives it back to the kernel, which then clears new pages.

    Costs a few hundred MB where sizes differ, and saves most of the system time of a large export. Without glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_ARENA_MAX, 1)  # memory that another thread dropped, too


def collect_rarely() -> None:
    """Look for garbage rarely until `collect_again`: importing makes objects that stay, and looking is a sixth of its time."""
    if gc.get_threshold()[0] != _RARELY:
        _usual.append(gc.get_threshold())
        gc.set_threshold(_RARELY)


def collect_again() -> None:
    """Look for garbage as before `collect_rarely`, if that was called, but no more among the objects that there are."""
    if _usual:
        gc.freeze()
        gc.set_threshold(*_usual.pop())
