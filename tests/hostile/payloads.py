"""Pickles that would create a file when they are read, and where a checkpoint can hold them."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata


class Evil:
    """Object whose unpickling runs `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def calls(marker: Path) -> dict[str, Evil]:
    """Ways to create `marker`, by name."""
    return {
        "os.system": Evil(os.system, f"touch {marker}"),
        "eval": Evil(eval, f"open({str(marker)!r}, 'w').close()"),
        "open": Evil(open, str(marker), "w"),
        "path": Evil(Path.touch, marker),
        "torch.load": Evil(torch.load, io.BytesIO(saved(Evil(os.system, f"touch {marker}"))), None),
    }


def saved(value: Any) -> bytes:
    """Bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def spoil_metadata(folder: Path, evil: Any, inside: bool = False) -> None:
    """Replace a checkpoint's .metadata by a hostile object, or put that object into it."""
    file = folder / ".metadata"
    found: Metadata = pickle.loads(file.read_bytes())
    if inside:
        found.planner_data = {"x": evil}
    file.write_bytes(pickle.dumps(found if inside else evil))


def spoil_objects(folder: Path, evil: Any) -> None:
    """Replace every object in a checkpoint, such as a layer's extra state, by a hostile one."""
    file = folder / ".metadata"
    found: Metadata = pickle.loads(file.read_bytes())
    data = saved([evil])
    for index, place in found.storage_data.items():
        if type(found.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata":
            (folder / f"{len(data)}.distcp").write_bytes(data)
            place.relative_path, place.offset, place.length = f"{len(data)}.distcp", 0, len(data)
    file.write_bytes(pickle.dumps(found))
