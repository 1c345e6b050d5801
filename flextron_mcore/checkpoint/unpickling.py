"""Restricted reading of the pickles in a torch checkpoint, so that opening one executes nothing that its files contain.

`.metadata` is a pickle: only the classes that torch writes there are allowed in it. Other objects (extra states, the optimizer's
hyper-parameters, common.pt) are pickles that torch reads with `weights_only`.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from flextron_mcore.config import FlextronError
from flextron_mcore.files import check_file, check_folder, child, explain, first_line, read_bytes

METADATA_FILE = ".metadata"
_REMEDY = "bring it back from a copy, or make the checkpoint again"
_LARGEST = 2**30  # bytes of .metadata
# Classes and functions in the .metadata of torch 2.6 to 2.13 and Megatron-Core 0.16 to 0.19, by module.
_MODULES = {
    metadata: (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    filesystem: ("_StorageInfo",),
    planner: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
}
_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in _MODULES.items()
        for name in names
        if hasattr(module, name)
    },
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # a look-up in a table of names
    # Python 3.13 pickles paths under another module's name, which other versions lack.
    **{
        (module, name): pathlib.PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath")
    },
}


class _Unpickler(pickle._Unpickler):
    """Unpickler of .metadata that builds objects of the classes in `_ALLOWED` only.

    It derives from pickle's unpickler in Python, because the one in C allocates a table as large as the largest number in the
    file.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return _ALLOWED[module, name]

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], tuple(each for each in _ALLOWED.values() if isinstance(each, type))):
            raise pickle.UnpicklingError("it changes an object that no checkpoint holds")
        super().load_build()

    def load_memo(self) -> None:
        number = int.from_bytes(self.read(4), "little")
        if number > _LARGEST:
            raise pickle.UnpicklingError("it numbers more objects than it can hold")
        self.memo[number] = self.stack[-1]

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.LONG_BINPUT[0]] = load_memo


def read_metadata(folder: Path) -> Metadata:
    """Content of the file .metadata in the directory of a checkpoint; nothing in the file is executed.

    Raises FlextronError if .metadata is missing, damaged or holds anything but torch's own classes, names a file outside of the
    checkpoint, or describes more data than the files hold.
    """
    file = folder / METADATA_FILE
    try:
        data = read_bytes(file, largest=_LARGEST)
        found = _Unpickler(io.BytesIO(data)).load()
        _check(folder, found)
    except FlextronError:
        raise
    except FileNotFoundError:
        raise FlextronError(f"{file} is missing: {_REMEDY}") from None
    except Exception as error:  # a damaged pickle raises errors of any type
        raise FlextronError(f"{file} is damaged, or not a checkpoint's: {explain(error)}: {_REMEDY}") from None
    return found


def _check(folder: Path, found: Any) -> None:
    """Raise ValueError or FlextronError unless `found` is a Metadata whose tensors and objects lie in files of `folder`."""
    if (
        not isinstance(found, Metadata)
        or not isinstance(found.state_dict_metadata, dict)
        or not isinstance(found.storage_data, dict)
    ):
        raise ValueError("it holds no description of tensors")
    sizes: dict[str, int] = {}
    for place in found.storage_data.values():
        name = place.relative_path
        if name not in sizes:
            path = child(folder, name, folder / METADATA_FILE)
            check_file(path)
            sizes[name] = path.stat().st_size
        if not 0 <= place.offset <= place.offset + place.length <= sizes[name]:
            raise FlextronError(
                f"{folder / name} is truncated: {sizes[name]} bytes, but {METADATA_FILE} describes more: {_REMEDY}"
            )
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{name} is compressed")
    for key, stored in found.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            continue
        total = 0
        for chunk in stored.chunks:
            if min((*chunk.sizes, *chunk.offsets), default=0) < 0:
                raise ValueError(f"tensor {key} has a negative size")
            total += chunk.sizes.numel()
            if (
                chunk.sizes.numel() * stored.properties.dtype.itemsize
                > found.storage_data[MetadataIndex(key, chunk.offsets)].length
            ):
                raise ValueError(f"tensor {key} is larger than its file")
        if total != stored.size.numel():
            raise ValueError(f"tensor {key} has {total} stored elements, not {stored.size.numel()}")


def check_checkpoint(folder: Path) -> None:
    """Check a checkpoint before Megatron-Core loads it, because Megatron-Core unpickles .metadata without checks.

    Raises FlextronError if .metadata is missing or damaged, holds anything but torch's own classes, names a file outside of the
    checkpoint, or describes more data than the files hold; also for a file that is a link out of the directory, or not regular.
    """
    check_folder(folder)
    read_metadata(folder)


@contextlib.contextmanager
def only_data() -> Iterator[None]:
    """Context in which every torch.load of this process reads data only and executes nothing, whoever calls it.

    torch.distributed.checkpoint asks for `weights_only=False` when it reads objects; an environment variable of torch overrides
    it.
    """
    force, forbid = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name) for name in (force, forbid) if name in os.environ}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update(before)


def reason(error: BaseException) -> str:
    """Text that says why loading failed: the first line of the error, or a fixed text for an object that is not plain data.

    torch's own text for such an object advises the user to load the file without this protection.
    """
    return "an object in it is not plain data" if isinstance(error, pickle.UnpicklingError) else first_line(error)


def without_extra_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """State dict with None for every `_extra_state`: Transformer Engine would unpickle it, and it holds FP8 statistics only."""
    return {key: None if key.endswith("_extra_state") else value for key, value in state.items()}
