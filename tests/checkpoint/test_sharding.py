"""Dealt order: at tensor-parallel size T, the first d/T units of all ranks together are the d most important ones."""

from __future__ import annotations

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from flextron_mcore.checkpoint.sharding import deal, to_disk_order, to_sorted_order
from flextron_mcore.config import FlextronError

UNITS, ROWS = 24, 3


def local_part(sorted_tensor: torch.Tensor, rank: int, ranks: int, granularity: int) -> torch.Tensor:
    """Units of a rank, most important first: unit i is in bucket i mod granularity, and ranks own equal shares of the buckets."""
    buckets = granularity // ranks
    mine = [i for i in range(UNITS) if rank * buckets <= i % granularity < (rank + 1) * buckets]
    return sorted_tensor.unflatten(0, (UNITS, ROWS))[mine].flatten(0, 1)


@pytest.mark.parametrize("granularity", [1, 2, 4, 8])
@pytest.mark.parametrize("axis, blocks", [(0, 1), (0, 2), (1, 1)])
def test_orders_are_inverse(granularity, axis, blocks):
    tensor = torch.randn(blocks * UNITS * ROWS, blocks * UNITS * ROWS)
    stored = to_disk_order(tensor, axis, UNITS, granularity, blocks)
    assert torch.equal(to_sorted_order(stored, axis, UNITS, granularity, blocks), tensor)
    assert granularity == 1 or not torch.equal(stored, tensor)
    for first in (1, 8, 11, UNITS):
        part = to_sorted_order(stored, axis, UNITS, granularity, blocks, first).unflatten(axis, (blocks, -1))
        kept = -(-first // granularity) * granularity
        assert torch.equal(part, tensor.unflatten(axis, (blocks, -1)).narrow(axis + 1, 0, kept * part.shape[axis + 1] // kept))


@pytest.mark.parametrize("granularity, ranks", [(1, 1), (4, 1), (4, 2), (4, 4), (8, 2)])
@pytest.mark.parametrize("axis, blocks", [(0, 1), (0, 2), (1, 1)])
def test_factory_writes_the_disk_order_and_reads_it_back(granularity, ranks, axis, blocks):
    whole = torch.randn(blocks * UNITS * ROWS, 5)
    if axis == 1:
        whole = whole.T.contiguous()
    expected = to_disk_order(whole, axis, UNITS, granularity, blocks)
    written = torch.full_like(whole, float("nan"))
    for rank in range(ranks):
        parts = [
            local_part(block.movedim(axis, 0), rank, ranks, granularity).movedim(0, axis) for block in whole.chunk(blocks, axis)
        ]
        local = torch.cat(parts, axis).contiguous()
        sharded = ShardedTensor.from_rank_offsets("w", local, (axis, rank, ranks), replica_id=0)
        factory = deal(sharded, axis, UNITS, granularity, ranks, blocks)
        shards = factory.build()
        for shard in shards:
            index = tuple(slice(o, o + n) for o, n in zip(shard.global_offset, shard.local_shape, strict=True))
            assert written[index].isnan().all()
            written[index] = shard.data
        assert torch.equal(factory.merge_fn([shard.data for shard in shards]), local)
        # candidate d: each rank's prefix of d/T units, together the d most important ones
        for d in range(granularity, UNITS + 1, granularity):
            head = parts[0].movedim(axis, 0)[: d // ranks * ROWS]
            top = whole.chunk(blocks, axis)[0].movedim(axis, 0)[: d * ROWS]
            assert all(any(torch.equal(row, other) for other in top) for row in head)
    assert torch.equal(written, expected)


def test_layouts_that_do_not_fit_are_refused():
    sharded = ShardedTensor.from_rank_offsets("w", torch.zeros(24, 2), (0, 0, 2), replica_id=0)
    with pytest.raises(FlextronError, match="tensor_model_parallel_size=2 does not divide space.granularity=1"):
        deal(sharded, 0, 48, 1, 2)
    with pytest.raises(FlextronError, match="w: 49 units are not divisible by space.granularity=2"):
        deal(sharded, 0, 49, 2, 2)
