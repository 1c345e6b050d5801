"""Files in safetensors format, read and written one tensor at a time; the library would hold a whole file in memory.

A file consists of the header's length (8 bytes, little-endian), the header (JSON: dtype, shape and place of each tensor), the
data.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flextron_mcore import files
from flextron_mcore.checkpoint.precision import converted
from flextron_mcore.config import FlextronError
from flextron_mcore.digests import HashingFile
from flextron_mcore.families.directory import read_json
from flextron_mcore.runtime.disk import forget

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LONGEST_HEADER = files.LARGEST_TEXT  # bytes; the safetensors library allows 100 MB
_PART = 2**20  # elements of a part of a tensor
_MOST_CACHED = 32 * 2**20  # bytes written between two flushes, to bound the page cache


@dataclass(frozen=True)
class StoredTensor:
    """Tensor in a safetensors file, which is not read yet.

    Attributes:
        file: the file.
        dtype: name of the dtype in the format (F32, BF16, ...).
        shape: shape of the tensor.
        start: offset of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype in torch. Raises FlextronError for integers and 8-bit floats, which are quantized weights."""
        if self.dtype not in _DTYPES:
            raise FlextronError(
                f"{self.file}: weights stored as {self.dtype}: quantized models are not supported: import the original model"
            )
        return _DTYPES[self.dtype]

    def read(self) -> torch.Tensor:
        """Read the tensor to the CPU. Raises FlextronError if the file ends before the tensor does."""
        return self._read(0, math.prod(self.shape)).view(self.shape)

    def read_parts(self) -> Iterator[torch.Tensor]:
        """Read the tensor in flat parts of about a million elements each. Raises FlextronError if the file ends too early."""
        count = math.prod(self.shape)
        for first in range(0, count, _PART):
            yield self._read(first, min(_PART, count - first))

    def _read(self, first: int, count: int) -> torch.Tensor:
        # Read, not mapped: pages of a mapped file count as this process's memory.
        size = self.torch_dtype.itemsize
        buffer = torch.empty(count * size, dtype=torch.uint8)
        with files.open_file(self.file) as file:
            file.seek(self.start + first * size)
            if file.readinto(memoryview(buffer.numpy())) != buffer.numel():
                raise FlextronError(f"{self.file}: ends before its last tensor: the file is damaged, download it again")
        return buffer.view(self.torch_dtype)


def open_weights(directory: Path) -> dict[str, StoredTensor]:
    """{name: tensor} of all weights in a directory: in model.safetensors, else in shards with an index. Only headers are read.

    Raises FlextronError for weights that are missing, incomplete or damaged.
    """
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        if any(directory.glob("*.bin")):
            raise FlextronError(
                f"{directory}: holds *.bin weights only: convert them to safetensors, with transformers' "
                "save_pretrained(..., safe_serialization=True)"
            )
        raise FlextronError(
            f"{directory}: no weights in it (neither {WEIGHTS_FILE} nor {INDEX_FILE}): set hf= to a directory with safetensors"
        )
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise FlextronError(f"{index}: has no 'weight_map' from tensors to files: download it again")
    stored: dict[str, StoredTensor] = {}
    for name in sorted(set(shards.values())):
        if not files.child(directory, name, index).is_file():
            raise FlextronError(
                f"{directory / name}: no such file, but {INDEX_FILE} names it: the download is incomplete, repeat it"
            )
        stored.update(read_header(directory / name))
    for tensor, name in shards.items():
        if tensor not in stored:
            raise FlextronError(
                f"{directory / name}: lacks the tensor {tensor[:200]} that {INDEX_FILE} lists: download both again"
            )
    return stored


def read_header(file: Path) -> dict[str, StoredTensor]:
    """{name: tensor} of one safetensors file; only the header is read.

    Raises FlextronError for a file that is damaged or of the wrong size, and FileNotFoundError.
    """
    size = file.stat().st_size
    damaged = FlextronError(f"{file}: not a safetensors file, or damaged ({size} bytes): download it again")
    with files.open_file(file) as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
        if length > _LONGEST_HEADER:
            raise damaged
        text = stream.read(length)
    if len(text) < length:
        raise FlextronError(f"{file}: {size} bytes, expected more than {8 + length}: the file is cut off, download it again")
    stored, places = {}, [(0, 0)]
    try:
        header = files.parse_json(text)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            places.append(tuple(entry["data_offsets"]))
            first, last = places[-1]
            stored[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + first)
            if any(type(number) is not int or number < 0 for number in (first, last, *entry["shape"])):
                raise damaged
            if entry["dtype"] in _DTYPES and last - first != math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize:
                raise damaged
    except (ValueError, TypeError, KeyError, AttributeError):
        raise damaged from None
    places.sort()
    if any(before[1] != after[0] for before, after in itertools.pairwise(places)):  # a gap, or tensors that overlap
        raise damaged
    end = places[-1][1]
    if size != 8 + length + end:
        raise FlextronError(f"{file}: {size} bytes, expected {8 + length + end}: the file is damaged, download it again")
    return stored


class TensorFile:
    """Context manager that writes a safetensors file, tensors in any order, with the same bytes as the safetensors library.

    At the end of the context it raises AssertionError if a tensor is missing.

    Args:
        path: file to write.
        shapes: {name: shape} of all tensors of the file.
        dtype: dtype of all tensors of the file; tensors are converted to it.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._path, self._shapes, self._dtype, self._missing = path, shapes, dtype, set(shapes)
        self._cached = 0  # bytes written since the last flush

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
        self._file = HashingFile(self._path)
        self._file.write(struct.pack("<Q", len(text)) + text)
        return self

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write some of the file's tensors, in any order.

        tensors: {name: tensor on the CPU}. Raises AssertionError for a shape other than the declared one, and FlextronError for
        weights that are not finite in the file's dtype.
        """
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != self._shapes[name]:
                raise AssertionError(f"{name}: {tuple(tensor.shape)} instead of {self._shapes[name]}")
            self._missing.discard(name)
            self._file.seek(self._begins[name])
            data = converted(tensor, self._dtype, f"tensor {name}").contiguous().flatten().view(torch.uint8).numpy()
            self._file.write(data)
            self._cached += data.nbytes
        if self._cached > _MOST_CACHED:
            self._file.flush()
            forget(self._path)
            self._cached = 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        forget(self._path)
        if kind is None and self._missing:
            raise AssertionError(f"{self._path.name}: lacks {', '.join(sorted(self._missing))}")
