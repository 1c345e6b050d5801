"""Repairs of differences and faults in Megatron-Core 0.16.1 to 0.19, and of paths that Python 3.13 pickled."""

from __future__ import annotations

import inspect
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from megatron.core import dist_checkpointing

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel


def know_paths() -> None:
    """Let this Python read checkpoints that 3.13 wrote: torch pickles paths into .metadata, whose module has a new name there."""
    sys.modules.setdefault("pathlib._local", pathlib)


def save_options() -> dict[str, Any]:
    """Arguments for dist_checkpointing.save.

    In 0.19 the background writer is by default that of a package of its own (nvidia-resiliency-ext); Megatron-Core's writer, the
    only one before, is still there.
    """
    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def count_padding(model: DistributedDataParallel) -> None:
    """Let the distributed optimizer save its state as it is; call before it is made.

    All versions leave out the padding at the ends of buckets when they put the state together, and then look parameters up where
    they are with it: behind a bucket that is no multiple of 128 elements and of the data-parallel size, what is saved is another
    parameter's. With padding counted, it is not left out.
    """
    for buffer in model.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
