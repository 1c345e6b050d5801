"""Reading of files that come with an input: regular files only, of bounded size, depth and link targets. No torch import.

An input may be made by somebody else. A FIFO would block a reader for ever, a link could lead to any file of the user, and a
small text can describe a value that fills the memory. All of these become a FlextronError that names the file.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flextron_mcore.config import FlextronError

LARGEST_TEXT = 64 * 2**20  # bytes; JSON takes up to 22 times as much in memory
_LARGEST_YAML = 2**20  # bytes, which take 3 seconds
LARGEST_LOG = 2**30  # bytes; logs are parsed a line at a time
_DEEPEST, _MOST = 64, 20_000_000  # levels and values of a JSON text
_DIGITS = 40  # of a whole number; tokenizers write 10**30 for "no limit"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}


def expanded(path: str | os.PathLike) -> Path:
    """Path with the home directory in place of a leading `~` or `~user`; unchanged for an unknown user."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises RuntimeError for an unknown user


def open_file(file: str | os.PathLike, given: bool = False) -> io.BufferedReader:
    """Open a regular file for reading bytes.

    Raises FlextronError for anything else, such as a FIFO, and without `given` also for a link out of its directory, except
    within a Hugging Face cache (`check_link`). Raises OSError if the file is missing or cannot be opened.

    Args:
        file: path of the file.
        given: True for a file that the user named, which may be a link to anywhere; False for a file in a directory that somebody
            else may have made.
    """
    file = Path(file)
    if not given:
        check_link(file)
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: opening a FIFO would wait for a writer
    try:
        _check_kind(file, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_file(file: str | os.PathLike, given: bool = False) -> None:
    """Raise FlextronError if `file` exists and is not a regular file; without `given`, also for a link out of its directory.

    given: True for a file that the user named, which may be a link to anywhere.
    """
    file = Path(file)
    if not given:
        check_link(file)
    try:
        _check_kind(file, file.stat().st_mode)
    except FileNotFoundError:
        return


def check_folder(folder: Path) -> None:
    """Raise FlextronError if an entry of a directory is a link to a file elsewhere, or neither a regular file nor a directory."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                check_file(entry.path)


def check_link(file: Path) -> None:
    """Raise FlextronError if `file` is a link that leads out of its directory, except within a Hugging Face cache.

    A snapshot in that cache, models--NAME/snapshots/REVISION, consists of links to models--NAME/blobs.
    """
    if not file.is_symlink():
        return
    folder, found = file.parent.resolve(), file.resolve()
    caches = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    if not any(found.is_relative_to(place) for place in (folder, *caches)):
        raise FlextronError(
            f"{file}: is a link out of its directory, to {found}, which is not followed: if you trust it, copy the directory "
            "with `cp -rL`"
        )


def child(folder: Path, name: object, named_by: Path) -> Path:
    """Path of a file in `folder` that another file names; it need not exist.

    Raises FlextronError if the name leads out of the directory, or no file can have it. A link is not followed here.

    Args:
        folder: directory of both files.
        name: name as the other file gives it, of any type.
        named_by: path of the other file, for the message.
    """
    parts = Path(name).parts if isinstance(name, str) and "\0" not in name else ()
    inside = bool(parts) and not Path(name).is_absolute() and ".." not in parts
    try:
        if inside:
            (folder / name).lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # the caller says what is missing
    except (OSError, ValueError):  # no file can have this name: too long, or half of a surrogate pair
        inside = False
    if not inside:
        raise FlextronError(
            f"{named_by}: names the file {str(name)[:100]!r}, which is not inside its directory: use an unchanged copy"
        )
    return folder / name


def read_bytes(file: str | os.PathLike, given: bool = False, largest: int = LARGEST_TEXT) -> bytes:
    """Content of a regular file.

    Raises FlextronError for another kind of file, for one of more than `largest` bytes, and without `given` for a link out of its
    directory; OSError for a file that is missing or cannot be read.

    Args:
        file: path of the file.
        given: True for a file that the user named, which may be a link to anywhere.
        largest: most bytes.
    """
    with open_file(file, given) as stream:
        data = stream.read(largest + 1)
    if len(data) > largest:
        raise FlextronError(f"{file}: is larger than {largest >> 20} MiB, more than such a file needs: use an unchanged copy")
    return data


def read_text(file: str | os.PathLike, given: bool = False, largest: int = LARGEST_TEXT) -> str:
    """Text of a regular file in UTF-8. Raises the errors of `read_bytes`, and UnicodeDecodeError (a ValueError).

    Args:
        file: path of the file.
        given: True for a file that the user named, which may be a link to anywhere.
        largest: most bytes.
    """
    return read_bytes(file, given, largest).decode("utf-8")


def read_json(file: str | os.PathLike, given: bool = False) -> Any:
    """Value in a JSON file. Raises the errors of `read_bytes`, and ValueError for a text that `parse_json` refuses.

    given: True for a file that the user named, which may be a link to anywhere.
    """
    return parse_json(read_bytes(file, given))


def parse_json(text: str | bytes) -> Any:
    """Value of a JSON text.

    Raises ValueError for a text that is not JSON, is nested too deeply, or has a huge integer, too many values (_MOST) or half of
    a surrogate pair.
    """
    try:
        value = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    escaped = _SURROGATE.search(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    for each in _containers(value):
        if escaped:
            for item in each if isinstance(each, list) else [*each, *each.values()]:
                if isinstance(item, str) and not _encodes(item):
                    raise ValueError("a text holds half of a surrogate pair")
    if escaped and isinstance(value, str) and not _encodes(value):
        raise ValueError("a text holds half of a surrogate pair")
    return value


def read_yaml(file: str | os.PathLike, given: bool = False) -> Any:
    """Value in a YAML file of at most 1 MiB.

    Raises the errors of `read_text`, and ValueError for a text that `parse_yaml` refuses.

    given: True for a file that the user named, which may be a link to anywhere.
    """
    return parse_yaml(read_text(file, given, _LARGEST_YAML))


def parse_yaml(text: str) -> Any:
    """Value of a YAML text. Raises ValueError unless it is YAML of texts, numbers, lists and mappings, of bounded size."""
    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # beside YAMLError, tags and dates raise many types, such as IndexError for `!!int ''`
        raise ValueError(" ".join(str(error).split())[:200] or "not YAML") from None
    # Without aliases a text has fewer values than characters; aliases of aliases stand for any number.
    for each in _containers([value], len(text) + 10_000):
        for item in each if isinstance(each, list) else [*each, *each.values()]:
            if not isinstance(item, str | int | float | list | dict | None):
                raise ValueError(f"the value {str(item)[:40]} is not a text, number, list or mapping")
    return value


def explain(error: BaseException) -> str:
    """Words for an error of reading or parsing, for a message to users: without the names of Python's errors, on one line."""
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}"
    if isinstance(error, KeyError):
        return f"lacks {error}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, EOFError):
        return "ends too early"
    if isinstance(error, LookupError | TypeError | AttributeError):  # their texts speak of Python's types
        return "an entry is missing or of another type"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """First line of an error's message, at most 200 characters; "damaged" if the message is empty."""
    return (str(error).strip().splitlines() or ["damaged"])[0][:200]


def _check_kind(file: Path, mode: int) -> None:
    """Raise FlextronError naming `file` unless `mode` (os.stat) is a regular file's."""
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "special")
        raise FlextronError(f"{file}: is {kind}, not a regular file: name or put a file there")


def _whole_number(digits: str) -> int:
    """Convert the digits of a JSON integer. Raises ValueError for more than _DIGITS digits."""
    if len(digits) > _DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _encodes(text: str) -> bool:
    """True unless the text holds half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _containers(value: Any, most: int = _MOST) -> Iterator[list | dict]:
    """All lists and mappings of a value, level by level. Raises ValueError for more than `most` values, or too many levels."""
    level, count = [value] if isinstance(value, list | dict) else [], 0
    for _ in range(_DEEPEST):
        count += sum(map(len, level))
        if count > most:
            raise ValueError("too many values")
        yield from level
        level = [
            item
            for each in level
            for item in (each if isinstance(each, list) else each.values())
            if isinstance(item, list | dict)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")
