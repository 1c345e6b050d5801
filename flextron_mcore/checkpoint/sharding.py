"""Dealt order: the order of heads and neurons on disk and in the memory of each tensor-parallel rank.

With granularity G (space.granularity), unit i belongs to bucket i mod G. On disk the buckets follow each other, under vanilla
names and shapes: a stock GPTModel loads the full model at any tensor-parallel size T that divides G, unless the space has
compensation, which a stock model ignores (layers/compensation.py).

In memory, rank r of T owns the n = G/T buckets r*n .. r*n+n-1 with its units in increasing order: local unit a*n + k is the a-th
unit of its k-th bucket. The order before dealing is called sorted order here, because `flextron importance` sorts it by
importance; an imported or pretrained checkpoint that was not sorted is dealt in the same way.
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
    """{end of a tensor's name, such as "linear_fc1.weight": dimension that is split over tensor-parallel ranks}.

    Tensors without such a dimension are left out. field: name of the factor of the dimension's size (families/tensors.py) that is
    split, ffn_hidden_size or kv_groups.
    """
    return {
        ".".join(tensor.name.split(".")[-2:]): axis
        for tensor in TENSORS
        for axis, side in enumerate(tensor.sides)
        if any(factor.name == field and factor.parallel for factor in side.factors)
    }


MLP_AXES, ATTENTION_AXES = _parallel_axes("ffn_hidden_size"), _parallel_axes("kv_groups")


def dealt_axis(model: ModelConfig, space: ElasticSpace, key: str) -> tuple[int, int, int, int] | None:
    """(axis, units, granularity, blocks) of a tensor whose heads or neurons are stored in dealt order; None for other tensors.

    They are the last arguments of `to_disk_order`. axis: dimension of the units. units: number of units (KV groups, neurons)
    along it. granularity: number of buckets. blocks: equal blocks stacked along the dimension, 2 for the gate and up projection
    of a gated MLP.

    Args:
        model: architecture of the full model.
        space: elastic space.
        key: name of the tensor in the checkpoint.
    """
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
    """Wrap a tensor-parallel ShardedTensor so that its heads or neurons are stored in dealt order, bucket after bucket.

    Args:
        sharded: this rank's part of the tensor, in the order of memory.
        axis: dimension that is split over tensor-parallel ranks.
        units: number of elastic units along it in the full model, such as neurons or KV groups.
        granularity: number of buckets, G.
        tensor_parallel_size: number of ranks, T.
        blocks: equal blocks stacked along the dimension: 2 for the gate and up projection of a gated MLP.

    Raises:
        FlextronError: T does not divide G, or G does not divide the number of units.
    """
    check_granularity(granularity, tensor_parallel_size)
    if units % granularity:
        raise FlextronError(
            f"{sharded.key}: {units} units are not divisible by space.granularity={granularity}: choose one that divides them"
        )
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
        """View of the local tensor with `axis` split in four: [.., blocks, units a, buckets k, rows of a unit, ..]."""
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
    """Raise FlextronError unless the tensor-parallel size divides the granularity, the number of buckets on disk."""
    if granularity % tensor_parallel_size:
        raise FlextronError(
            f"model.tensor_model_parallel_size={tensor_parallel_size} does not divide space.granularity={granularity} "
            "of this checkpoint: choose one that does, or sort again with `flextron importance "
            f"space.granularity={tensor_parallel_size}`, with space.attention_unit=query_head too where there are fewer KV groups"
        )


def to_disk_order(tensor: torch.Tensor, axis: int, units: int, granularity: int, blocks: int = 1) -> torch.Tensor:
    """Deal the units of a whole tensor into buckets: unit i goes to bucket i mod granularity, and buckets follow each other.

    Args:
        tensor: whole tensor with its units in order, not dealt.
        axis: dimension of the units (KV groups, neurons).
        units: number of units along it.
        granularity: number of buckets.
        blocks: equal blocks stacked along the dimension: 2 for the gate and up projection of a gated MLP.
    """
    return _reorder(tensor, axis, blocks, (units // granularity, granularity))


def to_sorted_order(
    tensor: torch.Tensor, axis: int, units: int, granularity: int, blocks: int = 1, first: int | None = None
) -> torch.Tensor:
    """Whole tensor with its units in order, from the buckets on disk: the inverse of `to_disk_order`.

    Args:
        tensor: whole tensor, units bucket after bucket.
        axis: dimension of the units (KV groups, neurons).
        units: number of units along it.
        granularity: number of buckets.
        blocks: equal blocks stacked along the dimension: 2 for the gate and up projection of a gated MLP.
        first: take only this many units of each block, rounded up to a multiple of the granularity; None: all. Other units are
            not read.
    """
    return _reorder(tensor, axis, blocks, (granularity, units // granularity), first and -(-first // granularity))


def _reorder(tensor: torch.Tensor, axis: int, blocks: int, shape: tuple[int, int], first: int | None = None) -> torch.Tensor:
    """Transpose the units of each block of `axis`, seen as a matrix of `shape`, and keep the first `first` rows of the result.

    Args:
        tensor: whole tensor.
        axis: dimension of the units.
        blocks: equal blocks stacked along it.
        shape: (rows, columns) of the matrix of units.
        first: rows of the transposed matrix to keep; None: all.
    """
    rows = tensor.shape[axis] // (blocks * shape[0] * shape[1])
    swapped = tensor.unflatten(axis, (blocks, *shape, rows)).transpose(axis + 1, axis + 2)
    return swapped.narrow(axis + 1, 0, first or shape[1]).flatten(axis, axis + 3)
