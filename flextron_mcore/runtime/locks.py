"""Lock files that admit one writing process for each output. The kernel releases a lock when its process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from flextron_mcore.config import FlextronError

INSIDE = ".lock"  # name of the lock file of a directory whose parent cannot be written
_PATIENCE = 1.0  # seconds to wait for a lock: helpers of a killed process hold its lock until they end just after
_held: set[Path] = set()


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file or directory `target`, which need not exist yet, within the block.

    The lock is an flock on the file `.NAME.lock` beside the real path of `target`. The file is removed at the end, and so are
    directories that were created for it and are still empty. After kill -9 the file stays, unlocked and without effect. If this
    process already holds the lock of `target` or of a directory above, no further lock is taken.

    Raises FlextronError naming the process that holds the lock, or if a directory cannot be created, and OSError if the lock file
    cannot be created.
    """
    real = target.resolve()
    if any(place in _held for place in (real, *real.parents)):
        yield
        return
    made = _make_directories(target, real.parent)
    try:
        file = _lock_file(real)
        descriptor = _acquire(file, target)
    except BaseException:
        _remove_empty(made)
        raise
    _held.add(real)
    try:
        yield
    finally:
        _held.discard(real)
        with contextlib.suppress(OSError):
            file.unlink()  # before the release, so that a waiting process sees that the name is gone and creates a new file
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # helper processes may have inherited the open file
        os.close(descriptor)
        _remove_empty(made)


def _lock_file(target: Path) -> Path:
    """Path of the lock file: beside `target`, or in the directory `target` if its parent is not writable, such as a mount."""
    if target.is_dir() and not os.access(target.parent, os.W_OK):
        return target / INSIDE
    return target.with_name(f".{target.name}.lock")


def _acquire(file: Path, target: Path) -> int:
    """Open and lock `file`, and return its descriptor. Raises FlextronError if another process holds the lock."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, NotADirectoryError) as error:  # in /proc, or below a file
            raise FlextronError(f"out={target}: cannot be written: {error.strerror}: choose another out") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise FlextronError(f"out={target}: {holder} is writing to it: wait for its end, or choose another out") from None
        except OSError:
            pass  # a file system without locks
        if _is_named(file, descriptor):
            break
        os.close(descriptor)
    with contextlib.suppress(OSError):  # the name is for the message only
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _is_named(file: Path, descriptor: int) -> bool:
    """True if `file` still names the opened file, which the previous holder of the lock may have removed."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _make_directories(target: Path, folder: Path) -> list[Path]:
    """Create `folder` and its parents, and return the created ones, uppermost first. target: path for the message."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()][::-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise FlextronError(f"out={target}: cannot be written: {error.strerror}: choose another out") from None
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()
