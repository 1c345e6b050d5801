"""Estimate of the memory that a stage needs, made before it computes; an error if this machine has less."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import show
from flextron_mcore.launch.activations import activations
from flextron_mcore.launch.estimate import memory_of
from flextron_mcore.launch.layout import Layout, Rank
from flextron_mcore.runtime.distributed import device
from flextron_mcore.settings.training import StageSettings

# Files with the memory limit of a container: of cgroup version 2 and of version 1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_line(settings: StageSettings, info: CheckpointInfo) -> str:
    """Line to print before a stage computes: tokens of one forward pass, and the estimated memory of the rank that needs most.

    The estimate (docs/estimates.md) counts tensors, without the memory of libraries.

    Args:
        settings: settings of the stage.
        info: architecture, elastic space and stored precision of the model.

    Raises:
        FlextronError: this machine has less memory, or the parallel layout does not fit the model.
    """
    cuda = device().type == "cuda"
    layout = Layout.read(info.model, info.space, settings, int(os.environ.get("WORLD_SIZE", "1")), info.dtype, cuda)
    ranks = [Rank(info.model, layout, index) for index in range(layout.pipeline)]
    largest = max(ranks, key=lambda rank: sum(memory_of(rank, settings)))
    needed = sum(memory_of(largest, settings))
    together = 1 if cuda else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share this machine's memory
    limit = machine_memory()
    where = "a rank" if together == 1 else f"each of {together} ranks"
    text = f"about {show('memory', needed)} of memory on {where}, of {show('memory', limit)}"
    size = f"{layout.micro_batch} x {layout.length} tokens a forward pass"
    if layout.length == info.model.default_length < info.model.max_position_embeddings:
        size += f" (the model has {info.model.max_position_embeddings} positions)"
    if needed * together > limit:
        key = "setting.batch_size or setting.prompt_length" if settings.stage == "latency" else _keys(settings)
        share = activations(largest, settings) / needed
        raise FlextronError(
            f"{settings.stage}: needs {text}, {share:.0%} of it for {size}: lower {key}, or use more ranks or a machine with more"
        )
    return f"{settings.stage}: {size}; {text}"


def _keys(settings: StageSettings) -> str:
    """Keys of the stage that lower the memory of activations, for a message."""
    names = [f"model.{name}" for name in ("micro_batch_size", "seq_length") if hasattr(settings.model, name)]
    return " or ".join(names)


def machine_memory() -> int:
    """Bytes of memory of this rank's GPU; without a GPU, of the machine or container, which all its processes share."""
    if device().type == "cuda":
        return torch.cuda.get_device_properties(device()).total_memory
    found = [psutil.virtual_memory().total]
    for file in map(Path, _LIMITS):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            found.append(int(text))
    return min(found)
