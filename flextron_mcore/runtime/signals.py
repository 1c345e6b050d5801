"""SIGTERM and SIGUSR1: what schedulers send before they take the machine away. And the time that a process may train for.

While training they ask for a stop after the step in progress; at any other time they end the process at once.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command continues the run
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TIME_IS_UP = 1000  # `received` when it is no signal: larger than any signal's number

_deferred = False
_received = 0
_deadline: float | None = None


class Stopped(BaseException):
    """Training stopped for a signal, its state is on disk. The text is the line for the user."""


def install(end: Callable[[str, int], NoReturn]) -> None:
    """Take the signals over. Call in the main thread.

    end: called with a line for the user and an exit code when a signal comes that is not deferred. It must end the process: an
    exception thrown anywhere is lost in some callbacks of C++ extensions, and fatal in others.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        global _received
        if _deferred:
            _received = _received or number
            return
        ignore()
        end(f"flextron: stopped by {signal.Signals(number).name}", 128 + number)

    for number in SIGNALS:
        signal.signal(number, handle)


def ignore() -> None:
    """From now on the signals change nothing: this process is ending already."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def defer(wanted: bool) -> None:
    """Let a signal wait until the program looks for it (`received`), or, with wanted=False, end the process."""
    global _deferred, _received
    _deferred, _received = wanted, 0


def limit(seconds: float | None) -> None:
    """How long this process may train, counted from its start; None: for ever."""
    global _deadline
    import psutil

    _deadline = None if seconds is None else psutil.Process().create_time() + seconds


def received() -> int:
    """Reason to stop: the number of the first signal since signals are deferred, else TIME_IS_UP if it is, else 0."""
    return _received or (TIME_IS_UP if _deadline is not None and time.time() >= _deadline else 0)


def stop(number: int, stage: str, step: int) -> NoReturn:
    """Raise Stopped for what was received: training ended after `step`, whose checkpoint is whole."""
    ignore()
    cause = "trainer.max_time" if number == TIME_IS_UP else signal.Signals(number).name
    reason = f"stopped by {cause} after step {step}"
    raise Stopped(f"{stage}: {reason}; its checkpoint is written: run the same command again to continue")


@contextlib.contextmanager
def deaf_helpers() -> Iterator[None]:
    """Helper processes started in the block never get the signals, nor Ctrl-C; this process gets them after it at the latest.

    Schedulers, torchrun and terminals send a signal to the whole process group, which would kill the writers of a checkpoint.
    """
    from multiprocessing import resource_tracker

    blocked = (*SIGNALS, signal.SIGINT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        resource_tracker.ensure_running()  # whoever needs it starts it, which unblocks signals
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
