"""Dealt order: how sorted units lie on disk and in the memory of each tensor-parallel rank.

Sorted unit i belongs to bucket i mod G. On disk the buckets follow each other (vanilla names and shapes, so a stock GPTModel
loads the full model at any T that divides G). In memory, rank r of T owns the n = G/T buckets r*n .. r*n+n-1 with its units in
decreasing importance: local unit a*n + k is the a-th unit of its k-th bucket.
"""

from __future__ import annotations

import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from flextron_mcore.axes import added_tensors
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families.tensors import TENSORS, find
from flextron_mcore.space import ElasticSpace, SubNetwork


def _parallel_axes(field: str) -> dict[str, int]:
    """Tensors, by the last two parts of their names, one axis of which counts `field`, and that axis."""
    return {
        ".".join(tensor.name.split(".")[-2:]): axis
        for tensor in TENSORS
        for axis, side in enumerate(tensor.sides)
        if any(factor.name == field and factor.parallel for factor in side.factors)
    }


MLP_AXES, ATTENTION_AXES = _parallel_axes("ffn_hidden_size"), _parallel_axes("kv_groups")


def dealt_axis(model: ModelConfig, space: ElasticSpace, key: str) -> tuple[int, int, int, int] | None:
    """(axis, units, granularity, blocks) of a tensor that is stored in dealt order, None for one that is not."""
    whole = {"vocab_size"} if space.attention_unit == "kv_group" else {"vocab_size", "kv_groups"}
    tensor = find(key, added_tensors())
    if tensor is None:
        return None
    full = SubNetwork.full(model)
    for axis, (side, sizes) in enumerate(zip(tensor.sides, tensor.sizes(model, full.hidden_size, full.layers[0]), strict=True)):
        for number, factor in enumerate(side.factors):
            if factor.parallel and factor.name not in whole:
                return axis, sizes[number], space.granularity, math.prod(sizes[:number])
    return None


def deal(
    sharded: ShardedTensor, axis: int, units: int, granularity: int, tensor_parallel_size: int, blocks: int = 1
) -> ShardedTensorFactory:
    """Wrap a tensor-parallel ShardedTensor so that it is stored in dealt order.

    axis: the axis split over tensor-parallel ranks. units: elastic units along it in the full model (neurons, KV groups).
    blocks: equal blocks stacked along the axis (2 for the gate and up projections of a gated MLP).
    """
    check_granularity(granularity, tensor_parallel_size)
    if units % granularity:
        raise FlextronError(f"{sharded.key}: {units} units are not divisible by space.granularity={granularity}")
    buckets = granularity // tensor_parallel_size  # n
    prepended = sharded.prepend_axis_num
    position = axis + prepended
    rank = sharded.global_offset[position] // sharded.local_shape[axis]
    outer = [
        (i, sharded.global_offset[i], sharded.axis_fragmentations[i])
        for i in range(prepended)
    ]  # fmt: skip
    local_units = units // tensor_parallel_size

    def split(tensor: torch.Tensor) -> torch.Tensor:
        """[.., blocks, units a, buckets k, rows of a unit, ..] of the local tensor, viewed along `axis`."""
        rows = tensor.shape[axis] // (blocks * local_units)
        return tensor.unflatten(axis, (blocks, local_units // buckets, buckets, rows))

    def build(key: str, tensor: torch.Tensor, replica_id, flattened_range=None) -> list[ShardedTensor]:
        viewed = split(tensor.detach())
        shards = []
        for block in range(blocks):
            for k in range(buckets):
                part = viewed.select(axis, block).select(axis + 1, k).flatten(axis, axis + 1).contiguous()
                shards.append(
                    ShardedTensor.from_rank_offsets(
                        key,
                        part,
                        *outer,
                        (position, block * granularity + rank * buckets + k, blocks * granularity),
                        replica_id=replica_id,
                        prepend_axis_num=prepended,
                    )
                )
        return shards

    def merge(shards: list[torch.Tensor]) -> torch.Tensor:
        joined = []
        for block in range(blocks):
            parts = shards[block * buckets : (block + 1) * buckets]
            parts = [part.unflatten(axis, (local_units // buckets, -1)) for part in parts]
            joined.append(torch.stack(parts, axis + 1).flatten(axis, axis + 2))
        return torch.cat(joined, axis)

    return ShardedTensorFactory(sharded.key, sharded.data, build, merge, replica_id=sharded.replica_id)


def check_granularity(granularity: int, tensor_parallel_size: int) -> None:
    """Raise FlextronError unless `tensor_parallel_size` divides the granularity."""
    if granularity % tensor_parallel_size:
        raise FlextronError(
            f"model.tensor_model_parallel_size={tensor_parallel_size} does not divide space.granularity={granularity} "
            "of this checkpoint; `flextron importance space.granularity=...` can change that"
        )


def to_disk_order(tensor: torch.Tensor, axis: int, units: int, granularity: int, blocks: int = 1) -> torch.Tensor:
    """Whole tensor, sorted order -> bucket order along `axis` (no ranks involved)."""
    return _reorder(tensor, axis, blocks, (units // granularity, granularity))


def to_sorted_order(
    tensor: torch.Tensor, axis: int, units: int, granularity: int, blocks: int = 1, first: int | None = None
) -> torch.Tensor:
    """Whole tensor, bucket order -> sorted order along `axis`: the inverse of `to_disk_order`.

    first: of each block only this many units, rounded up to a multiple of the granularity; nothing else is read.
    """
    return _reorder(tensor, axis, blocks, (granularity, units // granularity), first and -(-first // granularity))


def _reorder(tensor: torch.Tensor, axis: int, blocks: int, shape: tuple[int, int], first: int | None = None) -> torch.Tensor:
    """Swaps the two axes of `shape` within each block along `axis`; first: keeps so many of what is then the outer one."""
    rows = tensor.shape[axis] // (blocks * shape[0] * shape[1])
    swapped = tensor.unflatten(axis, (blocks, *shape, rows)).transpose(axis + 1, axis + 2)
    return swapped.narrow(axis + 1, 0, first or shape[1]).flatten(axis, axis + 3)
