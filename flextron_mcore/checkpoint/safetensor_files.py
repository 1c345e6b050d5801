"""Files of the safetensors format, read and written a tensor at a time; the library wants all of a file in memory.

A file is the length of a header (8 bytes, little-endian), the header (JSON: dtype, shape and place of each tensor), the data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.disk import forget

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_MOST_CACHED = 32 * 2**20  # bytes of a file that are written before the disk has to have them


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file. `dtype` is the format's own name (F32, BF16, ...), `start` its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's. Raises FlextronError for integers and 8-bit floats: those are quantized weights."""
        if self.dtype not in _DTYPES:
            raise FlextronError(
                f"{self.file}: weights stored as {self.dtype}: quantized models are not supported, import the original"
            )
        return _DTYPES[self.dtype]

    def read(self) -> torch.Tensor:
        """The tensor. The file is read, not mapped: pages of a mapped file would count as this process's memory."""
        buffer = torch.empty(math.prod(self.shape) * self.torch_dtype.itemsize, dtype=torch.uint8)
        with self.file.open("rb") as file:
            file.seek(self.start)
            if file.readinto(memoryview(buffer.numpy())) != buffer.numel():
                raise FlextronError(f"{self.file}: ends before its last tensor: the file is damaged, download it again")
        return buffer.view(self.torch_dtype).view(self.shape)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises FlextronError naming the file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FlextronError(f"{file}: no such file: hf= takes the directory of a Hugging Face model") from None
    except (ValueError, OSError) as error:
        raise FlextronError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise FlextronError(f"{file}: not a JSON object")
    return values


def open_weights(directory: Path) -> dict[str, StoredTensor]:
    """All tensors stored in `directory`, in one safetensors file or in shards with an index; only headers are read.

    Raises FlextronError for weights that are missing, incomplete or damaged.
    """
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        if any(directory.glob("*.bin")):
            raise FlextronError(
                f"{directory}: holds *.bin weights only: convert them to safetensors first "
                "(load with transformers and save_pretrained(..., safe_serialization=True))"
            )
        raise FlextronError(f"{directory}: no weights in it (looked for {WEIGHTS_FILE} and {INDEX_FILE})")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise FlextronError(f"{index}: has no 'weight_map' from tensors to files")
    stored: dict[str, StoredTensor] = {}
    for name in sorted(set(shards.values())):
        if not (directory / name).is_file():
            raise FlextronError(f"{directory / name}: no such file, though {INDEX_FILE} names it: the download is incomplete")
        stored.update(read_header(directory / name))
    for tensor, name in shards.items():
        if tensor not in stored:
            raise FlextronError(f"{directory / name}: lacks the tensor {tensor}, though {INDEX_FILE} says it is there")
    return stored


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises FlextronError for a damaged file; for one of the wrong size, with the size it should have.
    """
    size = file.stat().st_size
    damaged = FlextronError(f"{file}: not a safetensors file, or damaged ({size} bytes): download it again")
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
        if length > _LONGEST_HEADER:
            raise damaged
        text = stream.read(length)
    if len(text) < length:
        raise FlextronError(f"{file}: {size} bytes, expected more than {8 + length}: the file is cut off, download it again")
    stored, end = {}, 0
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            stored[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + first)
            end = max(end, last)
            if entry["dtype"] in _DTYPES and last - first != math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize:
                raise damaged
    except (ValueError, TypeError, KeyError, AttributeError):
        raise damaged from None
    if size != 8 + length + end:
        raise FlextronError(f"{file}: {size} bytes, expected {8 + length + end}: the file is damaged, download it again")
    return stored


class TensorFile:
    """A file to be written, tensors in any order; byte for byte what the library writes.

    A context manager. Raises AssertionError for a tensor of another shape, or where one is missing at the end.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._path, self._shapes, self._dtype, self._missing = path, shapes, dtype, set(shapes)
        self._cached = 0  # bytes in the page cache, which nobody reads again

    def __enter__(self) -> TensorFile:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        name = next(name for name, dtype in _DTYPES.items() if dtype == self._dtype)
        begins, end = {}, 0
        for key, shape in sorted(self._shapes.items()):
            begins[key], end = end, end + self._dtype.itemsize * math.prod(shape)
            entries[key] = {"dtype": name, "shape": shape, "data_offsets": [begins[key], end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._begins = {key: 8 + len(text) + begin for key, begin in begins.items()}
        self._file = self._path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        return self

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write some of the tensors, each where it belongs."""
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != self._shapes[name]:
                raise AssertionError(f"{name}: {tuple(tensor.shape)} instead of {self._shapes[name]}")
            self._missing.discard(name)
            self._file.seek(self._begins[name])
            data = tensor.to(self._dtype).contiguous().flatten().view(torch.uint8).numpy()
            self._file.write(data)
            self._cached += data.nbytes
        if self._cached > _MOST_CACHED:
            self._file.flush()
            forget(self._file.name)
            self._cached = 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        forget(self._path)
        if kind is None and self._missing:
            raise AssertionError(f"{self._path.name}: lacks {', '.join(sorted(self._missing))}")
