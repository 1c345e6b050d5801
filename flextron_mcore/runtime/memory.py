"""Settings of the C library's memory allocator and of Python's garbage collector."""

from __future__ import annotations

import contextlib
import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_RARELY = 10**6  # new objects between two collections
_usual: list[tuple[int, int, int]] = []


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors instead of returning it to the kernel, which must clear every new page.

    Saves most of the system time of a large export. Costs a few hundred MB when tensor sizes differ. No effect without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_ARENA_MAX, 1)  # one arena, so that all threads reuse each other's freed memory


def collect_rarely() -> None:
    """Run the garbage collector rarely until `collect_again`.

    Collections during imports take a sixth of the time and free nothing.
    """
    if gc.get_threshold()[0] != _RARELY:
        _usual.append(gc.get_threshold())
        gc.set_threshold(_RARELY)


def collect_again() -> None:
    """Undo `collect_rarely`, and exclude all existing objects from garbage collection (gc.freeze).

    Has no effect without a call of `collect_rarely` before.
    """
    if _usual:
        gc.freeze()
        gc.set_threshold(*_usual.pop())
