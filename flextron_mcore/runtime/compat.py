"""Workarounds for differences and bugs of Megatron-Core 0.16.1 to 0.19, and for paths that Python 3.13 pickled."""

from __future__ import annotations

import inspect
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from megatron.core import dist_checkpointing

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel


def know_paths() -> None:
    """Let this Python read checkpoints of Python 3.13, whose .metadata has pickled paths of the module pathlib._local."""
    sys.modules.setdefault("pathlib._local", pathlib)


def save_options() -> dict[str, Any]:
    """Keyword arguments for dist_checkpointing.save that select Megatron-Core's own asynchronous writer.

    The default of Megatron-Core 0.19 is the writer of the package nvidia-resiliency-ext. Earlier versions have no choice, and the
    result is {}.
    """
    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def count_padding(model: DistributedDataParallel) -> None:
    """Work around wrong states in checkpoints of Megatron-Core's distributed optimizer. Call before creating the optimizer.

    Megatron-Core (all versions) drops the padding at the end of each bucket when it gathers the state, but then looks parameters
    up at offsets that include the padding. After a bucket that is not a multiple of 128 elements and of the data-parallel size,
    it would save another parameter's state. This function counts the padding as elements, so that it stays in the gathered state.
    """
    for buffer in model.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
