"""Megatron's token files PREFIX.bin and their indices PREFIX.idx: sizes, digests and consistency."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import FlextronError
from ..files import open_file

_PARTS, _SEEN = 16, 1 << 16  # a token file's digest covers about _PARTS parts of _SEEN bytes, evenly spread
_HEAD = 34  # bytes: magic, version, dtype code, sequences, documents (+1); then lengths, pointers, document boundaries
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # without Megatron's float types


@dataclass(frozen=True)
class Index:
    """Content of an .idx file.

    Attributes:
        dtype: type of the tokens in the .bin file.
        lengths: int32 [documents], tokens of each document (of each sentence if Megatron-LM's --split-sentences was used).
        digest: SHA-256 of the .idx file and of parts of the .bin file.
    """

    dtype: type[np.integer]
    lengths: np.ndarray
    digest: bytes


def read_index(prefix: Path, advice: str) -> Index:
    """Index of a token file, after a check that it is consistent and that the .bin file holds its tokens.

    Megatron-Core reads at the offsets of an index without a check.

    Args:
        prefix: path without .bin and .idx.
        advice: end of the messages, what to do about a bad file.

    Raises:
        FlextronError: a file is missing or truncated, or the index is damaged; the message names the file.
    """
    code, lengths, pointers, documents = _tables(prefix, advice)
    file = with_suffix(prefix, ".idx")
    size = np.dtype(_DTYPES[code]).itemsize
    ends = np.cumsum(lengths, dtype=np.int64) * size
    whole = not len(lengths) or (lengths.min() >= 0 and pointers[0] == 0 and np.array_equal(pointers[1:], ends[:-1]))
    ordered = len(documents) and documents[0] == 0 and documents[-1] == len(lengths) and (np.diff(documents) >= 0).all()
    if not (whole and ordered):
        raise FlextronError(f"{file}: is damaged, its lengths and offsets contradict each other: {advice}")
    return Index(_DTYPES[code], lengths, digest_of(prefix, int(lengths.sum(dtype=np.int64)), advice))


def digest_of(prefix: Path, tokens: int, advice: str) -> bytes:
    """SHA-256 of an .idx file and of parts of its .bin file, after a check that they fit together and hold `tokens` tokens.

    Raises FlextronError naming the file that is missing or truncated.

    Args:
        prefix: path without .bin and .idx.
        tokens: number of tokens of the .bin file.
        advice: end of the messages, what to do about a bad file.
    """
    code = _head(prefix, advice)[0]
    binary = with_suffix(prefix, ".bin")
    try:
        with open_file(with_suffix(prefix, ".idx")) as stream:
            digest = hashlib.file_digest(stream, "sha256")
        held = binary.stat().st_size
        with open_file(binary) as stream:
            for start in (*range(0, held, max(_SEEN, held // _PARTS)), max(0, held - _SEEN)):
                stream.seek(start)
                digest.update(stream.read(_SEEN))
    except OSError as error:
        raise FlextronError(f"{error.filename}: cannot be read ({error.strerror}): {advice}") from None
    size = np.dtype(_DTYPES[code]).itemsize
    if held != tokens * size:
        raise FlextronError(
            f"{binary}: is truncated or belongs to other data: it has {held} bytes, not {tokens} tokens of {size} bytes: {advice}"
        )
    return digest.digest()


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Path of a token file (.bin) or index (.idx); the prefix may hold a full stop."""
    return prefix.with_name(prefix.name + suffix)


def _head(prefix: Path, advice: str) -> tuple[int, int, int]:
    """(dtype code, sequences, document boundaries) of an .idx file whose size fits them.

    Raises FlextronError for a file that is missing, truncated or no index of tokens.
    """
    index = with_suffix(prefix, ".idx")
    try:
        with open_file(index) as stream:
            head = stream.read(_HEAD)
        found = index.stat().st_size
    except OSError as error:
        raise FlextronError(f"{index}: cannot be read ({error.strerror}): {advice}") from None
    magic, version, code, sequences, documents = struct.unpack("<9sQBQQ", head.ljust(_HEAD, b"\0"))
    if magic != b"MMIDIDX\0\0" or version != 1 or found != _HEAD + 12 * sequences + 8 * documents or code not in _DTYPES:
        raise FlextronError(f"{index}: is truncated or not a Megatron index: {advice}")
    return code, sequences, documents


def _tables(prefix: Path, advice: str) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """(dtype code, lengths int32 [sequences], byte offsets int64 [sequences], document boundaries int64) of an .idx file."""
    code, sequences, documents = _head(prefix, advice)
    data = np.memmap(with_suffix(prefix, ".idx"), mode="r")
    places = np.cumsum([_HEAD, 4 * sequences, 8 * sequences, 8 * documents])
    parts = [data[start:end] for start, end in zip(places, places[1:], strict=False)]
    return code, *(part.view(kind) for part, kind in zip(parts, (np.int32, np.int64, np.int64), strict=True))
