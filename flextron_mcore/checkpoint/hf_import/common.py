"""What the importers of all families share: reading safetensors one tensor at a time, and config values."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flextron_mcore.config import FlextronError, ModelConfig

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_REQUIRED = object()


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


@dataclass(frozen=True)
class Recipe:
    """How one Megatron-Core tensor is made: `sources` are Hugging Face names and shapes, `join` takes these tensors in order."""

    shape: tuple[int, ...]
    sources: Mapping[str, tuple[int, ...]]
    join: Callable[..., torch.Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Family:
    """A family of Hugging Face models: one file of this package each, listed in `hf_import.FAMILIES`.

    prefix: what its tensor names begin with, absent in checkpoints of the bare model. ignored: stored tensors that are not
    weights. model_config: config.json -> ModelConfig. recipes: Megatron-Core name -> Recipe, for the whole model.
    """

    architecture: str
    model_type: str
    prefix: str
    ignored: re.Pattern[str]
    model_config: Callable[[Mapping[str, Any]], ModelConfig]
    recipes: Callable[[ModelConfig], dict[str, Recipe]]


def value(config: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """`config[key]` of type `kind` (int counts as float); `default` where it is absent or null. Raises FlextronError."""
    found = config.get(key)
    if found is None:
        if default is _REQUIRED:
            raise FlextronError(f"lacks '{key}'")
        return default
    if kind is float and type(found) is int:
        return float(found)
    if type(found) is not kind:
        raise FlextronError(f"{key} must be of type {kind.__name__}, not {found!r}")
    return found


def require(config: Mapping[str, Any], key: str, expected: Any) -> None:
    """Raise FlextronError unless the option `key` is absent, null or `expected`, the only value that is supported."""
    if config.get(key) not in (None, expected):
        raise FlextronError(f"{key}={config[key]!r} is not supported (only {expected!r} is)")


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
    """The tensors of one safetensors file: 8 bytes, the length n of a JSON header; the header; the data.

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
