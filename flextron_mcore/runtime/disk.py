"""Writing to disk: all or nothing, and one line when it cannot be done."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from flextron_mcore.config import FlextronError


@contextlib.contextmanager
def write_aside(target: Path) -> Iterator[Path]:
    """A directory beside `target` to write into; it takes the name `target` at the end, or goes if anything fails.

    Where `target` is a link, what it leads to is written. A full disk becomes a FlextronError.
    """
    target = target.resolve()
    aside = target.parent / f".{target.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    with disk_errors(target):
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            raise FlextronError(f"{target}: cannot be written: {error.strerror}") from None
        try:
            yield aside
            publish(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def publish(aside: Path, target: Path) -> None:
    """Give a finished directory its name, replacing what had it."""
    if target.exists():
        old = target.parent / f".{target.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        aside.rename(target)


def write_whole(file: Path, text: str) -> None:
    """Write a small file at once: it has all of the old content or all of the new, whatever happens."""
    aside = file.with_name(f".{file.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def forget(file: str | os.PathLike) -> None:
    """Have on disk, and out of the page cache, what was written to a file so far.

    The next file then takes the same memory. A virtual machine gets new memory from its host page by page, which costs more than
    the copy into it, and a page cache full of what is read elsewhere has no room for what is read here.
    """
    with open(file, "rb") as opened:
        os.fdatasync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_line(error: BaseException) -> str:
    """The start of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """torch.distributed.checkpoint wraps what goes wrong on a rank in a BaseException of its own: raise what went wrong."""
    try:
        yield
    except BaseException as error:
        # Not imported here, which takes a second: what raised it has imported it.
        api = sys.modules.get("torch.distributed.checkpoint.api")
        if api and isinstance(error, api.CheckpointException):
            raise next(iter(error.failures.values()))[0] from None
        raise


@contextlib.contextmanager
def disk_errors(target: Path, state: str = "nothing was changed") -> Iterator[None]:
    """Turn "no space left", "read-only" and "permission denied", however wrapped, into a FlextronError naming `target`.

    state: what the user has now, for the message.
    """
    try:
        with plain_errors():
            yield
    except FlextronError:
        raise
    except Exception as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        raise FlextronError(f"{target}: cannot be written: {reason}; {state}, free space or choose another out=") from None


def _disk_error(error: BaseException | None) -> str | None:
    """The operating system's message if `error` or a cause of it is about writing to disk."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
    while error is not None:
        if isinstance(error, OSError) and error.errno in codes:
            return error.strerror
        text = str(error)
        if "No space left on device" in text or "file write failed" in text or "unexpected pos" in text:
            return "No space left on device"
        error = error.__cause__ or error.__context__
    return None


def check_space(directory: Path, need: int) -> None:
    """Raise FlextronError when the disk of `directory` has less than `need` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < need:
        raise FlextronError(
            f"{directory.parent}: cannot be written: {need / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free; "
            "free space or choose another out="
        )
