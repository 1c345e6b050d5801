"""Dealt order: how sorted units lie on disk and in the memory of each tensor-parallel rank.

Sorted unit i belongs to bucket i mod G. On disk the buckets follow each other (vanilla names and shapes, so a stock GPTModel
loads the full model at any T that divides G). In memory, rank r of T owns the n = G/T buckets r*n .. r*n+n-1 with its units in
decreasing importance: local unit a*n + k is the a-th unit of its k-th bucket.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import ElasticSpace

# Tensors whose rows or columns are elastic units, and the axis along which: of MLP neurons, and of attention.
MLP_AXES = {"linear_fc1.weight": 0, "linear_fc1.bias": 0, "linear_fc2.weight": 1}
ATTENTION_AXES = {"linear_qkv.weight": 0, "linear_qkv.bias": 0, "linear_proj.weight": 1}


def dealt_axis(model: ModelConfig, space: ElasticSpace, key: str) -> tuple[int, int, int, int] | None:
    """(axis, units, granularity, blocks) of a tensor that is stored in dealt order, None for one that is not."""
    name = ".".join(key.split(".")[-2:])
    if name in MLP_AXES:
        blocks = 2 if model.gated and name != "linear_fc2.weight" else 1
        return MLP_AXES[name], model.ffn_hidden_size, space.granularity, blocks
    if name in ATTENTION_AXES and space.attention_unit == "kv_group":
        return ATTENTION_AXES[name], model.num_query_groups, space.granularity, 1
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
