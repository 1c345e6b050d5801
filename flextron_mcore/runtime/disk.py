"""Atomic writes of directories and files, and conversion of disk errors into one-line messages."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.locks import locked


@contextlib.contextmanager
def write_aside(target: Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside `target`, which replaces `target` at the end of the block.

    If the block raises, the temporary directory is removed and `target` stays as it was. If `target` is a symbolic link, the
    directory that the link points to is replaced. The block holds the lock of `target`; leftovers of killed processes are
    removed first. Raises FlextronError if another process holds the lock, and for a full or read-only disk.
    """
    target = target.resolve()
    aside = _aside(target)
    with disk_errors(target), locked(target):
        recover(target)
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            raise FlextronError(f"{target}: cannot be written: {error.strerror}: choose another out=") from None
        try:
            yield aside
            publish(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def publish(aside: Path, target: Path) -> None:
    """Rename the finished directory `aside` to `target`, and remove an old directory `target`, if there is one.

    The old and the new directory exchange their names atomically. On a file system without this operation, such as NFS, the old
    directory is renamed first; `recover` cleans up after a process that was killed between the two renames.
    """
    old = _replaced(target)
    if target.exists() and _exchange(aside, target):
        shutil.rmtree(aside, ignore_errors=True)
        return
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        aside.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically (renameat2); False if the C library or the file system cannot."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "renameat2"):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return libc.renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0


def recover(target: Path) -> None:
    """Clean up after a process that was killed in `write_aside`. Afterwards `target` is the new or the old directory, complete.

    The caller must hold the lock of `target`.
    """
    target = target.resolve()
    shutil.rmtree(_aside(target), ignore_errors=True)
    old = _replaced(target)
    if not old.exists():
        return
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(target)


def _aside(target: Path) -> Path:
    """Path of the temporary directory of `write_aside`."""
    return target.with_name(f".{target.name}.tmp")


def _replaced(target: Path) -> Path:
    """Path to which `publish` renames the old directory `target` before its removal."""
    return target.with_name(f".{target.name}.old")


def write_whole(file: Path, text: str) -> None:
    """Replace a small text file atomically: after a crash, the file has either its old or its new content."""
    aside = file.with_name(f".{file.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def forget(file: str | os.PathLike) -> None:
    """Flush a file to disk and drop it from the page cache.

    The next file then reuses the memory. In a virtual machine the host provides new pages one by one, which takes longer than
    writing to them, and output in the page cache displaces input.
    """
    with open(file, "rb") as opened:
        os.fdatasync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise the first failing rank's error in place of the CheckpointException in which torch.distributed.checkpoint wraps it.

    CheckpointException is a BaseException, which `except Exception` does not catch.
    """
    try:
        yield
    except BaseException as error:
        # An import takes a second. A process that raised the exception has imported the module already.
        api = sys.modules.get("torch.distributed.checkpoint.api")
        if api and isinstance(error, api.CheckpointException):
            raise next(iter(error.failures.values()))[0] from None
        raise


@contextlib.contextmanager
def disk_errors(target: Path, state: str = "nothing was changed") -> Iterator[None]:
    """Turn disk errors within the block, also as the cause of another error, into a FlextronError naming `target`.

    Disk errors are: no space or quota left, a read-only file system, no permission, a failing device, too many open files.
    Errors of files outside of the parent directory of `target`, such as an unreadable input, are raised unchanged.
    state: clause of the message on the state of the output, such as "nothing was changed".
    """
    try:
        with plain_errors():
            yield
    except FlextronError:
        raise
    except Exception as error:
        reason = _disk_error(error, target)
        if reason is None:
            raise
        raise FlextronError(f"{target}: cannot be written: {reason}; {state}, free space or choose another out=") from None


def _disk_error(error: BaseException | None, target: Path) -> str | None:
    """Message of the operating system if `error`, or an error that caused it, is a disk error at `target`; else None."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.ENFILE)
    while error is not None:
        if isinstance(error, OSError) and error.errno in codes:
            file = error.filename
            elsewhere = isinstance(file, str) and not Path(file).resolve().is_relative_to(target.resolve().parent)
            return None if elsewhere else error.strerror
        text = str(error)
        # A checkpoint's writers are processes of their own: their errors arrive as text.
        number = re.search(r"\[Errno (\d+)\] [^:]*$", text)
        if number and int(number[1]) in codes:
            return os.strerror(int(number[1]))
        if "No space left on device" in text or "file write failed" in text or "unexpected pos" in text:
            return "No space left on device"
        error = error.__cause__ or error.__context__
    return None


def check_space(directory: Path, need: int) -> None:
    """Raise FlextronError if the file system of `directory` has fewer than `need` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < need:
        raise FlextronError(
            f"{directory.parent}: cannot be written: {_bytes(need)} needed, {_bytes(free)} free; "
            "free space or choose another out="
        )


def _bytes(number: float) -> str:
    """Text of a number of bytes with three digits and a unit, such as 1.29 MiB."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1000 and len(units) > 1:
        number /= 1024
        del units[0]
    return f"{number:.3g} {units[0]}"
