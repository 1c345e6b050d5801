"""Documents of a file of text, JSON lines, JSON or Parquet, plain or compressed.

The content of a file decides its format. Two suffixes count as well: a .jsonl or .ndjson file is always JSON lines, so that an
invalid first line is an error and not text, and only a .json file can be JSON.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from ..config import FlextronError, nearest
from ..files import open_file

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")
LINES_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
_KINDS = {dict: "an object", list: "a list", str: "a string", float: "a number", bool: "true or false", bytes: "binary data"}
_CHUNK = 1 << 20  # bytes
_LARGEST, _LONGEST_LINE = 1 << 29, 1 << 28  # maximum bytes of a text file, which is one document, and of a line
_BLANK_LINES = 100_000  # maximum number of blank lines in a row
_RATIO, _UNCHECKED = 200, 1 << 22  # maximum compression ratio; bytes up to which the ratio is not checked


class Broken(Exception):
    """Raised for a file that cannot be read as documents. The message is the reason, without the path of the file."""


@dataclass(frozen=True)
class Entry:
    """One document of a file, or the reason why this document cannot be read.

    Attributes:
        text: text of the document; "" for an empty or unreadable document.
        place: line, row or list entry in the file, such as "line 3"; "" if the document is the whole file.
        fault: reason why the document cannot be read; "" for a readable document.
    """

    text: str
    place: str = ""
    fault: str = ""


def inner_suffix(name: str) -> str:
    """Suffix of a file's name in lower case, after removal of a compression suffix: .jsonl for `wiki.jsonl.gz`."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix


def stem(name: str) -> str:
    """Name of a file without its suffix and its compression suffix: `wiki` for `wiki.jsonl.gz`."""
    path = PurePath(name)
    return PurePath(path.stem).stem if path.suffix.lower() in COMPRESSED_SUFFIXES else path.stem


def open_documents(path: Path, text_key: str) -> tuple[str, Iterator[Entry]]:
    """(format of a file: "text", "JSON lines", "JSON", "JSON without 'KEY', as text" or "Parquet"; iterator over its documents).

    Args:
        path: an existing file.
        text_key: field of a JSON object, or column of a Parquet file, that holds the text.

    Raises:
        Broken: the file cannot be read. The iterator raises Broken, too, for damage that it meets later.
        FlextronError: a package that the file's format needs is not installed.
    """
    with _broken():
        with open_file(path, given=True) as file:
            head = file.read(16)
        if head.startswith(b"PAR1"):
            return "Parquet", _parquet(path, text_key)
        stream: BinaryIO = io.BufferedReader(_Bounded(_opener(head, path), open_file(path, given=True)), _CHUNK)
        suffix = inner_suffix(path.name)
        if suffix in LINES_SUFFIXES:
            return "JSON lines", _lines(stream, (), text_key)
        first: list[bytes] = []
        written = 0  # lines that are not blank
        for line in itertools.islice(iter(lambda: stream.readline(_LONGEST_LINE + 1), b""), _BLANK_LINES):
            first.append(line)
            written += bool(line.strip())
            if written == 2:
                break
        if max(map(len, first), default=0) <= _LONGEST_LINE and _are_json_lines(
            [line for line in first if line.strip()], text_key
        ):
            return "JSON lines", _lines(stream, first, text_key)
        data = bytearray().join(first)  # grows in place: two copies of a large file would not fit
        first.clear()
        with stream:
            while len(data) <= _LARGEST and (chunk := stream.read(_CHUNK)):
                data += chunk
        if len(data) > _LARGEST:
            raise Broken(f"is one text of more than {_LARGEST >> 20} MiB: write it as JSON lines, one document a line")
    values = _json_values(data) if suffix == ".json" else []
    if not any(isinstance(value, dict) and text_key in value for value in values):
        # of a list of objects, the user may have meant another key
        name = f"JSON without '{text_key}', as text" if any(isinstance(value, dict) for value in values) else "text"
        return name, iter([_text(data)])
    return "JSON", (_of_row(row, text_key, f"entry {number}") for number, row in enumerate(values, start=1))


def _opener(head: bytes, path: Path) -> Callable[[BinaryIO], BinaryIO]:
    """Function from an opened file to the stream of its decompressed bytes; the file itself if it is not compressed.

    Raises FlextronError if the package that a Zstandard file needs is not installed.

    Args:
        head: first 16 bytes of the file, which show the compression (gzip, bzip2, xz or Zstandard).
        path: path of the file, for the message.
    """
    if head.startswith(b"\x1f\x8b"):
        return gzip.open
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return bz2.open
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.open
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[:1] and head[0] >> 4 == 5 and head[1:4] == b"\x2a\x4d\x18"):
        # Imported here, because this optional dependency is needed for .zst files only.
        zstandard = _package("zstandard", path, "is compressed with Zstandard")
        return lambda file: io.BufferedReader(_Zstandard(file, zstandard), _CHUNK)
    return lambda file: file


class _Bounded(io.RawIOBase):
    """Decompressed byte stream of a file that may be a decompression bomb.

    Reading raises Broken for a compression ratio above _RATIO, once more than _UNCHECKED bytes were read.

    opener: function from an opened file to the stream of its decompressed bytes. file: opened file, which `close` closes.
    """

    def __init__(self, opener: Callable[[BinaryIO], BinaryIO], file: BinaryIO) -> None:
        self.file, self.stream, self.made = file, opener(file), 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Read decompressed bytes into a buffer, which they may not fill; return their number, 0 at the end of the file.

        Raises Broken for a compression ratio above _RATIO, and the errors of the decompressor for damaged data.
        """
        count = self.stream.readinto(buffer)
        self.made += count
        if self.made > max(_UNCHECKED, _RATIO * self.file.tell()):
            raise Broken(f"is compressed to less than 1/{_RATIO} of its size, unlike text: decompress it and check its content")
        return count

    def close(self) -> None:
        """Close the file."""
        self.stream.close()
        self.file.close()
        super().close()


class _Zstandard(io.RawIOBase):
    """Decompressed byte stream of a .zst file with one or several frames.

    Reading raises EOFError for a damaged or truncated file; the reader of the package zstandard does not for a truncated one.

    file: opened file, which `close` closes. zstandard: the imported package.
    """

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self.file, self.zstandard = file, zstandard
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self.frame: Any = None
        self.made = memoryview(b"")
        self.left = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Read decompressed bytes into a buffer, which they may not fill; return their number, 0 at the end of the file.

        Raises EOFError for damaged data, and for a file that ends within a frame.
        """
        while not self.made:
            data = self.left or self.file.read(_CHUNK)
            if not data:
                if self.frame:
                    raise EOFError("ends within a Zstandard frame")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            try:
                self.made = memoryview(self.frame.decompress(data))
            except self.zstandard.ZstdError as error:
                raise EOFError(error) from None
            self.left = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
        count = min(len(buffer), len(self.made))
        buffer[:count], self.made = self.made[:count], self.made[count:]
        return count

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()


def _package(name: str, path: Path, what: str) -> Any:
    """Import an optional package. Raises FlextronError with the text `what`, the reason why `path` needs it."""
    try:
        return __import__(name)
    except ImportError:
        raise FlextronError(f"{path}: {what}, which needs the package {name}: pip install {name}") from None


@contextlib.contextmanager
def _broken() -> Iterator[None]:
    """Turn errors of reading and decompressing within the block into Broken."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise Broken(f"is a broken compressed file: {error}") from None
    except OSError as error:
        raise Broken(f"cannot be read: {error.strerror}" if error.strerror else f"is broken: {error}") from None


def _text(data: bytes | bytearray, place: str = "", within: str = "") -> Entry:
    """Entry of text in UTF-8. within: words after the offset of an invalid byte in the fault, such as " of the line"."""
    try:
        return Entry(data.decode("utf-8-sig"), place)
    except UnicodeDecodeError as error:
        return Entry("", place, f"is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}{within}")


def _line(stream: BinaryIO) -> bytes:
    """Next line of a stream, b"" at its end. Raises Broken for a line of more than _LONGEST_LINE bytes."""
    line = stream.readline(_LONGEST_LINE + 1)
    if len(line) > _LONGEST_LINE:
        raise Broken(f"has a line of more than {_LONGEST_LINE >> 20} MiB: cut it into documents, one a line")
    return line


def _lines(stream: BinaryIO, first: Iterable[bytes], key: str) -> Iterator[Entry]:
    """Entries of a stream of JSON lines, one for each line that is not blank.

    Raises Broken for damage, for a line of more than _LONGEST_LINE bytes, and for more than _BLANK_LINES blank lines in a row.

    Args:
        stream: the stream, which is closed at its end.
        first: leading lines that are already read from it.
        key: field of each object that holds the text.
    """
    with stream, _broken():
        blank = 0
        for number, line in enumerate(itertools.chain(first, iter(functools.partial(_line, stream), b"")), start=1):
            blank = 0 if line.strip() else blank + 1
            if blank > _BLANK_LINES:
                raise Broken(f"has more than {_BLANK_LINES} blank lines in a row: remove them")
            if not blank:
                decoded = _text(line, f"line {number}", " of the line")
                yield decoded if decoded.fault else _of_json(decoded, key)


def _of_json(line: Entry, key: str) -> Entry:
    """Document in a line of JSON: the text at `key`, or the reason why it cannot be read."""
    try:
        return _of_row(_parse(line.text), key, line.place)
    except json.JSONDecodeError as error:
        return Entry("", line.place, f"is not valid JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Entry("", line.place, "is not valid JSON: too deeply nested")


def _parse(text: str) -> Any:
    """Value of a JSON text, with all numbers as floats, because Python's int refuses more than 4,300 digits."""
    return json.loads(text, parse_int=float)


def _are_json_lines(lines: list[bytes], key: str) -> bool:
    """True if a file is JSON lines: the first line is an object with the key, or the first two lines are objects.

    lines: first one or two lines of the file that are not blank.
    """
    rows = []
    for line in lines:
        try:
            rows.append(_parse(line.decode("utf-8-sig")))
        except (ValueError, RecursionError):
            rows.append(None)
    objects = [isinstance(row, dict) for row in rows]
    return bool(objects) and objects[0] and (key in rows[0] or objects[1:] == [True])


def _json_values(data: bytes | bytearray) -> list[Any]:
    """Values of a JSON file: the items of a list, or the only value; [] if the file is not JSON."""
    try:
        value = _parse(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return []
    return value if isinstance(value, list) else [value]


def _of_row(row: Any, key: str, place: str) -> Entry:
    """Document in a JSON value: the text at `key` of an object, or the reason why it cannot be read.

    Args:
        row: value of a line or list entry.
        key: field that holds the text.
        place: line or list entry in the file, such as "line 3".
    """
    if not isinstance(row, dict):
        return Entry("", place, f"is not a JSON object but {_kind(row)}")
    if key not in row:
        return Entry("", place, f"has no key '{key}'{nearest(key, row)}: set text_key")
    return _of_value(row[key], key, place)


def _of_value(text: Any, key: str, place: str) -> Entry:
    """Document of the value at `key`: empty for None; a fault for another type than str, and for text that UTF-8 cannot encode.

    Args:
        text: the value.
        key: field or column that holds it, for the fault.
        place: line, list entry or row in the file.
    """
    if text is None:
        return Entry("", place)
    if not isinstance(text, str):
        return Entry("", place, f"key '{key}' is not a string but {_kind(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Entry("", place, f"key '{key}' holds a lone surrogate (\\ud800 to \\udfff), which UTF-8 cannot encode")
    return Entry(text, place)


def _kind(value: Any) -> str:
    """Name of the type of a JSON or Parquet value, with its article, for a message."""
    return _KINDS.get(type(value), "null" if value is None else "a number")


def _parquet(path: Path, key: str) -> Iterator[Entry]:
    """Documents in the column `key` of a Parquet file. Raises Broken for a damaged file, and without this column."""
    # Imported here, because this optional dependency is needed for Parquet files only.
    _package("pyarrow", path, "is a Parquet file")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if key not in names:
                raise Broken(f"has no column '{key}'{nearest(key, names)}, only {', '.join(names[:8])}: set text_key")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[key]):
                for value in batch.column(0):
                    number += 1
                    yield _of_cell(value, key, f"row {number}")
    except pyarrow.ArrowException as error:
        raise Broken(f"is a broken Parquet file: {' '.join(str(error).split())[:200]}") from None
    except OSError as error:  # also pyarrow's errors of damaged content
        raise Broken(f"cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None


def _of_cell(value: Any, key: str, place: str) -> Entry:
    """Document in a cell of a Parquet column, or the reason why it cannot be read.

    Args:
        value: cell, a scalar of pyarrow.
        key: name of the column.
        place: row in the file, such as "row 3".
    """
    try:
        return _of_value(value.as_py(), key, place)
    except UnicodeDecodeError as error:
        return Entry("", place, f"is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start} of the row")
