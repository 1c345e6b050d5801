"""Memory that a stage needs, said before it starts, and refused where this machine has less."""

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

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container: version 2, version 1


def memory_line(settings: StageSettings, info: CheckpointInfo) -> str:
    """Line to print before a stage computes: tokens of a forward pass, and the memory of a rank.

    The estimate (docs/estimates.md) counts tensors, not the libraries.

    Args:
        settings: settings of the stage.
        info: model, space and stored precision.

    Raises:
        FlextronError: this machine has less memory.
    """
    cuda = device().type == "cuda"
    layout = Layout.read(info.model, info.space, settings, int(os.environ.get("WORLD_SIZE", "1")), info.dtype, cuda)
    ranks = [Rank(info.model, layout, index) for index in range(layout.pipeline)]
    largest = max(ranks, key=lambda rank: sum(memory_of(rank, settings)))
    needed = sum(memory_of(largest, settings))
    together = 1 if cuda else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share the memory
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
            f"{settings.stage}: needs {text}, {share:.0%} of it for {size}: lower {key}, or use a machine or more ranks with more"
        )
    return f"{settings.stage}: {size}; {text}"


def _keys(settings: StageSettings) -> str:
    names = [f"model.{name}" for name in ("micro_batch_size", "seq_length") if hasattr(settings.model, name)]
    return " or ".join(names)


def machine_memory() -> int:
    """Bytes of memory of this rank's GPU, or of the machine or container that shares it among its processes."""
    if device().type == "cuda":
        return torch.cuda.get_device_properties(device()).total_memory
    found = [psutil.virtual_memory().total]
    for file in map(Path, _LIMITS):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            found.append(int(text))
    return min(found)
