"""The first samples of a dataset as micro-batches, shared out over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core import parallel_state
from torch.utils.data import Dataset

from flextron_mcore.data.blend import batch
from flextron_mcore.pipeline.networks import Batch


def count_batches(samples: int, micro_batch_size: int) -> int:
    """Micro-batches of each rank, as many for all; the interleaved schedule takes multiples of the pipeline's size."""
    count = -(-samples // (micro_batch_size * parallel_state.get_data_parallel_world_size()))
    if parallel_state.get_virtual_pipeline_model_parallel_world_size():
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        count = -(-count // stages) * stages
    return count


def share(dataset: Dataset, samples: int, micro_batch_size: int) -> Iterator[Batch]:
    """This rank's micro-batches, all of the same size; what is beyond the last sample is repeated and does not count."""
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    for round_ in range(count_batches(samples, micro_batch_size)):
        first = (round_ * ranks + rank) * micro_batch_size
        indices = range(first, first + micro_batch_size)
        made = batch(dataset, [i % samples for i in indices])
        for row, index in enumerate(indices):
            if index >= samples:
                made["loss_mask"][row] = 0
        yield made
