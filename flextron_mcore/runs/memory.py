"""Estimate of the memory that a stage needs, made before it computes; an error if this machine has less."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from flextron_mcore.axes import added_tensors
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.cost import show
from flextron_mcore.exports.compensation import moment_bytes
from flextron_mcore.families.tensors import of_model
from flextron_mcore.latency.measure import Setting
from flextron_mcore.launch.activations import activations, inference
from flextron_mcore.launch.estimate import memory_of
from flextron_mcore.launch.layout import Layout, Rank
from flextron_mcore.runtime.distributed import device
from flextron_mcore.settings.stages import ExportSettings, GenerateSettings, ImportSettings, SelectSettings
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import DTYPE_BYTES, SubNetwork, kv_cache_bytes, weight_bytes

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
    size = f"{layout.micro_batch} x {layout.length} tokens a forward pass"
    if layout.length == info.model.default_length < info.model.max_position_embeddings:
        size += f" (the model has {info.model.max_position_embeddings} positions)"
    key = "setting.batch_size or setting.prompt_length" if settings.stage == "latency" else _keys(settings)
    return _line(settings, needed, size, f"lower {key}", activations(largest, settings) / needed)


def generation_line(settings: GenerateSettings, info: CheckpointInfo, precision: str, lengths: Sequence[int]) -> str:
    """Line to print before text is generated: prompts, and the memory of a rank for weights, first pass and KV cache.

    Args:
        settings: settings of the stage.
        info: checkpoint; the full model is counted, whatever network is used.
        precision: precision of the computation.
        lengths: tokens of each prompt.

    Raises:
        FlextronError: this machine has less memory.
    """
    count, ranks, longest = len(lengths), settings.model.tensor_model_parallel_size, max(lengths) + settings.max_new_tokens
    needed = _inference_bytes(info.model, precision, "generation", (count, min(lengths), longest), ranks)
    return _line(
        settings, needed, f"{count} prompt(s), up to {longest} tokens each", "lower max_new_tokens, or give fewer prompts"
    )


def timing_line(settings: SelectSettings, info: CheckpointInfo, precision: str, setting: Setting) -> str:
    """Line to print before a network and the full model are timed: workload, and the memory of the process.

    Args:
        settings: settings of the stage.
        info: checkpoint.
        precision: precision of the computation.
        setting: workload of the latency table.

    Raises:
        FlextronError: this machine has less memory.
    """
    cached = setting.prompt_length + setting.generated_tokens if setting.kind == "generation" else 0
    needed = _inference_bytes(info.model, precision, setting.kind, (setting.batch_size, setting.prompt_length, cached))
    what = f"{setting.batch_size} x {setting.prompt_length} tokens, to measure latencies"
    return _line(settings, needed, what, "set measure=false")


def _inference_bytes(model: ModelConfig, precision: str, kind: str, sizes: tuple[int, int, int], ranks: int = 1) -> int:
    """Bytes of a rank for weights, the first forward pass and a KV cache of the full model.

    Args:
        model: architecture.
        precision: precision of the computation.
        kind: prefill or generation.
        sizes: number of sequences, tokens of each in the first pass, and tokens of each in the cache.
        ranks: number of tensor-parallel ranks.
    """
    count, first, cached = sizes
    cuda, layers = device().type == "cuda", (model.num_layers,)
    rank = Rank(model, Layout(ranks, 1, 1, 1, False, layers, count, first, DTYPE_BYTES[precision], ("", 1), cuda), 0)
    cache = kv_cache_bytes(model, None, count, cached, precision) // ranks
    return rank.parameters * rank.layout.dtype + inference(rank, kind) + cache


def comparison_line(settings: ExportSettings, info: CheckpointInfo, net: SubNetwork) -> str:
    """Line to print before an export: what is compared, and the memory of the main process.

    With verify=true the main process holds the checkpoint's part of its rank and, except on a GPU, the whole export, both in
    fp32. With verify=false nothing is compared, and the line says what converting a few tensors at a time needs (`copying_line`).

    Args:
        settings: settings of the stage.
        info: checkpoint.
        net: network that is exported.

    Raises:
        FlextronError: this machine has less memory.
    """
    if not settings.verify:
        return copying_line(settings, info)
    layout = settings.model
    needed = weight_bytes(info.model, dtype="fp32") // (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)
    needed += 0 if device().type == "cuda" else weight_bytes(info.model, net, "fp32")
    return _line(settings, needed, "checkpoint and export in fp32, to compare their logits", "set verify=false")


def calibration_line(settings: ExportSettings, info: CheckpointInfo, net: SubNetwork) -> str:
    """Line to print before projections are refitted: tokens of one forward pass, and the memory of the rank that needs most.

    It holds the model in fp32, the second moments of a pass (exports/compensation.py), and on a CPU the refitted weights and,
    with verify=true, the export in fp32.

    Args:
        settings: settings of the stage.
        info: checkpoint.
        net: network that is exported.

    Raises:
        FlextronError: this machine has less memory, or the parallel layout does not fit the model.
    """
    cuda = device().type == "cuda"
    layout = Layout.read(info.model, info.space, settings, int(os.environ.get("WORLD_SIZE", "1")), "fp32", cuda)
    largest = max((memory_of(Rank(info.model, layout, index), settings) for index in range(layout.pipeline)), key=sum)
    moments = moment_bytes(info.model, net, layout.tensor).values()
    # The solution of a layer is computed in fp64, with a copy of its moments.
    needed = sum(largest) + max(min(sum(moments), largest[0]), max(moments)) + 4 * max(moments)
    if not cuda:
        needed += weight_bytes(info.model, net, "fp32") * (1 + settings.verify)
    size = f"compensation on {layout.micro_batch} x {layout.length} tokens a forward pass in fp32"
    return _line(settings, needed, size, f"lower {_keys(settings)}")


def import_line(settings: ImportSettings, info: CheckpointInfo) -> str:
    """Line to print before an import: its memory, with verify=true that of the model in fp32, compared layer by layer at least.

    Raises FlextronError where this machine has less memory.
    """
    if not settings.verify:
        return copying_line(settings, info)
    needed = weight_bytes(info.model, dtype="fp32")
    return _line(settings, needed, "the model in fp32, to compare it with transformers", "leave verify=true out")


def copying_line(settings: StageSettings, info: CheckpointInfo) -> str:
    """Line to print before tensors are converted a few at a time.

    Counts six of the largest: two are written, three made ahead, and one is a copy (checkpoint/writer.py). Raises FlextronError
    where this machine has less memory.
    """
    model, layer = info.model, SubNetwork.full(info.model).layers[0]
    largest = max(
        tensor.numel(model, model.hidden_size, layer if place == "layer" else None)
        for place in ("before", "layer", "after")
        for tensor in of_model(model, place, added_tensors())
    )
    return _line(settings, 6 * largest * DTYPE_BYTES[info.dtype], "a few tensors at a time", "start fewer ranks")


def _line(settings: StageSettings, needed: int, what: str, remedy: str, share: float | None = None) -> str:
    """Line that says what a stage computes and needs. Raises FlextronError where this machine has less memory.

    Args:
        settings: settings of the stage.
        needed: bytes of a rank.
        what: what they are needed for.
        remedy: advice for a refusal.
        share: share of the bytes that `what` takes; None: all.
    """
    # Ranks on CPUs share the memory of their machine.
    together = 1 if device().type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    limit = machine_memory()
    where = "a rank" if together == 1 else f"each of {together} ranks"
    text = f"about {show('memory', needed)} of memory on {where}, of {show('memory', limit)}"
    if needed * together > limit:
        part = "" if share is None else f"{share:.0%} of it "
        raise FlextronError(
            f"{settings.stage}: needs {text}, {part}for {what}: {remedy}, or use more ranks or a machine with more"
        )
    return f"{settings.stage}: {what}; {text}"


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
