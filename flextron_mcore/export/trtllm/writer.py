"""Write rank{N}.safetensors, tensor by tensor."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from flextron_mcore.checkpoint.safetensor_files import TensorFile
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.export.trtllm.pieces import pieces
from flextron_mcore.export.trtllm.plan import Plan
from flextron_mcore.runtime.ranks import place, wait_for_all


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
            files = {rank: stack.enter_context(TensorFile(out / f"rank{rank}.safetensors", shapes, dtype)) for rank in ranks}
            for piece in todo:
                split = piece.split(tensors[piece.source].load())
                for rank, file in files.items():
                    file.write({name: parts[rank % plan.tp] for name, parts in zip(piece.shapes, split, strict=True)})
                if progress:
                    written = len(ranks) * dtype.itemsize * sum(map(math.prod, piece.shapes.values()))
                    progress(written * plan.tp * plan.pp // len(mine))
    wait_for_all()
