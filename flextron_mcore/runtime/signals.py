"""SIGTERM and SIGUSR1, which schedulers send before they end a job, and the time limit of training.

During training SIGUSR1 requests a stop after the current step, and SIGTERM one without it: after SIGTERM, the process may be
killed before a step of a large model ends. At any other time a signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from flextron_mcore.config import FlextronError

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not an error, the same command continues the run
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TIME_IS_UP, JOB_ENDS = 1000, 1001  # results of `received` for trainer.max_time and the job's end, above all signal numbers

_deferred = False
_received = 0
_deadline: float | None = None
_stop_at: float | None = None
_end: float | None = None
_writers: set[int] = set()  # processes that were started within deaf_helpers


class Stopped(BaseException):
    """Raised after training stopped at a signal or time limit and wrote a checkpoint. The message is a line for the user."""


def helper_killed(number: int | None = None) -> str:
    """Message for the death of a process that wrote a checkpoint. number: signal that killed it; None: not known."""
    by = f" by {signal.Signals(number).name}" if number else ""
    why = ", perhaps for lack of memory" if number in (None, signal.SIGKILL) else ""
    return (
        f"a process that wrote the checkpoint was killed{by}{why}; the last whole checkpoint is kept: run the same command again"
    )


def install(end: Callable[[str, int], NoReturn]) -> None:
    """Install the signal handlers. Call in the main thread.

    end: function (line for the user, exit code) that ends the process; called for a signal that is not deferred. The function
    must not raise, because an exception inside a callback of a C++ extension may be lost or crash the process.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        global _received
        if _deferred:
            _received = number if number == signal.SIGTERM else _received or number
            return
        ignore()
        end(f"flextron: stopped by {signal.Signals(number).name}", 128 + number)

    for number in SIGNALS:
        signal.signal(number, handle)


def end_with_parent() -> None:
    """Make the kernel kill this helper process when the thread that started it ends for any reason.

    Checkpoint writers of Megatron-Core and processes of `prepare` would else outlive a command that is killed by SIGKILL.
    """
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def ignore() -> None:
    """Ignore the signals from now on, because this process is ending already."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def defer(wanted: bool) -> None:
    """Defer signals: record the first one for `received` instead of ending the process. wanted: False ends the deferral."""
    global _deferred, _received
    _deferred, _received = wanted, 0


def limit(seconds: float | None, until: float | None = None, end: float | None = None) -> None:
    """Set the time limits of training; the earliest counts.

    Args:
        seconds: seconds from the start of this process (trainer.max_time); None: no limit.
        until: time in seconds since 1970 (`time.time`) at which training stops because its job ends soon; None: no limit.
        end: time in seconds since 1970 at which the job is killed, whose work must be saved before; None: no limit.
    """
    global _deadline, _stop_at, _end
    import psutil

    _deadline = None if seconds is None else psutil.Process().create_time() + seconds
    _stop_at, _end = until, end


def received(needed: float = 0.0) -> int:
    """Reason to stop: SIGTERM or else the first signal since `defer`, else JOB_ENDS near the job's end, else TIME_IS_UP, else 0.

    needed: seconds that the process still needs, if it goes on, until its work is saved.
    """
    if _received:
        return _received
    now = time.time()
    if (_stop_at is not None and now >= _stop_at) or (_end is not None and now + needed >= _end):
        return JOB_ENDS
    return TIME_IS_UP if _deadline is not None and now >= _deadline else 0


def urgent() -> bool:
    """True after a deferred SIGTERM: there may be no time for the rest of the step, only for a checkpoint."""
    return _received == signal.SIGTERM


def stop(number: int, stage: str, step: int) -> NoReturn:
    """Raise Stopped with a line for the user, and ignore signals from now on.

    Args:
        number: reason: number of a signal, TIME_IS_UP or JOB_ENDS, from `received`.
        stage: name of the stage, for the line that the user sees.
        step: last trained step, whose checkpoint is on disk; 0 if there is none.
    """
    ignore()
    cause = {TIME_IS_UP: "trainer.max_time", JOB_ENDS: "the end of its job (run.time_limit)"}.get(number)
    cause = cause or signal.Signals(number).name
    if not step:
        raise Stopped(f"{stage}: stopped by {cause} before the first step: run the same command again")
    reason = f"stopped by {cause} after step {step}"
    raise Stopped(f"{stage}: {reason}; its checkpoint is written: run the same command again to continue")


@contextlib.contextmanager
def deaf_helpers() -> Iterator[None]:
    """Block SIGNALS and SIGINT within the block. Processes started in the block never receive them.

    Schedulers, torchrun and terminals send signals to the whole process group, which would kill the processes that write a
    checkpoint. This process receives the signals after the block. Raises FlextronError if a process that was started in such a
    block is killed within one, because Megatron-Core would wait for it forever.
    """
    from multiprocessing import resource_tracker

    blocked = (*SIGNALS, signal.SIGINT)
    before, owner = signal.pthread_sigmask(signal.SIG_BLOCK, blocked), os.getpid()
    others = _children() - _writers  # such as the service of a logger, or workers that load data

    def child_ended(number: int, frame: FrameType | None) -> None:
        if not (killed := _killed_children(others)):
            return
        if os.getpid() != owner:  # a forked writer, which has helpers of its own
            os._exit(1)
        raise FlextronError(helper_killed(killed[0]))

    handler = signal.signal(signal.SIGCHLD, child_ended)
    try:
        resource_tracker.ensure_running()  # started now, since its start unblocks signals
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        yield
    finally:
        _writers.update(_children() - others)
        signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _children() -> set[int]:
    """Process ids of this process's children."""
    import psutil

    return {child.pid for child in psutil.Process().children()}


def _killed_children(others: set[int]) -> list[int]:
    """Signals that killed children which are still zombies (not waited for), except for `others`."""
    found = []
    for child in _children() - others:
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z" and (number := int(fields[49]) & 0x7F):  # of the status that `wait` would return
                found.append(number)
    return found
