"""Write rank{N}.safetensors, tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.export.trtllm.pieces import pieces
from flextron_mcore.export.trtllm.plan import Plan
from flextron_mcore.runtime.ranks import place, wait_for_all

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_ranks(
    out: Path,
    plan: Plan,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    progress: Callable[[int], None] | None,
) -> None:
    """Write the files of all TensorRT-LLM ranks. Call on all processes: they share the files.

    One tensor of the checkpoint is in memory at a time, and what it was padded to. progress is called with the bytes of each,
    scaled to the process's share.
    """
    process, processes = place()
    mine = range(plan.tp * plan.pp)[process::processes]
    for stage in range(plan.pp):
        ranks = [rank for rank in mine if rank // plan.tp == stage]
        if not ranks:
            continue
        todo = list(pieces(plan, stage))
        shapes = {name: shape for piece in todo for name, shape in piece.shapes.items()}
        with contextlib.ExitStack() as stack:
            files = {rank: stack.enter_context(_TensorFile(out / f"rank{rank}.safetensors", shapes, dtype)) for rank in ranks}
            for piece in todo:
                loaded = tensors[piece.source].load()
                for name, parts in zip(piece.shapes, piece.split(loaded), strict=True):
                    for rank, file in files.items():
                        file.append(name, parts[rank % plan.tp])
                if progress:
                    written = len(ranks) * dtype.itemsize * sum(map(math.prod, piece.shapes.values()))
                    progress(written * plan.tp * plan.pp // len(mine))
    wait_for_all()


class _TensorFile:
    """A safetensors file whose tensors come one after another: safetensors itself wants all of them at once.

    Its form: the length of the header (8 bytes, little-endian), the header (JSON: dtype, shape and place of each), the data.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._path, self._shapes, self._dtype = path, shapes, dtype
        self._missing = list(shapes)

    def __enter__(self) -> _TensorFile:
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in self._shapes.items():
            start, end = end, end + self._dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[self._dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = self._path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        return self

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, in the order of `shapes`."""
        expected = self._missing.pop(0)
        if (name, tuple(tensor.shape)) != (expected, self._shapes[expected]):
            raise AssertionError(f"{name} {tuple(tensor.shape)} instead of {expected} {self._shapes[expected]}")
        self._file.write(tensor.to(self._dtype).contiguous().view(torch.uint8).numpy())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise AssertionError(f"{self._path.name}: lacks {', '.join(self._missing)}")
