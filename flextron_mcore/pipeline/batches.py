"""Micro-batches of a dataset's first samples, distributed over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core import parallel_state
from torch.utils.data import Dataset

from flextron_mcore.data.blend import batch
from flextron_mcore.pipeline.networks import Batch
from flextron_mcore.runtime.progress import Progress


def count_batches(samples: int, micro_batch_size: int) -> int:
    """Number of micro-batches that each data-parallel rank runs, so that all ranks together see `samples` samples.

    Rounded up to a whole number, which the interleaved schedule needs to be a multiple of the pipeline size.
    """
    count = -(-samples // (micro_batch_size * parallel_state.get_data_parallel_world_size()))
    if parallel_state.get_virtual_pipeline_model_parallel_world_size():
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        count = -(-count // stages) * stages
    return count


def share(dataset: Dataset, samples: int, micro_batch_size: int) -> Iterator[Batch]:
    """Micro-batches of this data-parallel rank, all of the same size.

    The last ones are filled up with repeated samples whose loss mask is 0.

    Args:
        dataset: dataset whose first samples are used.
        samples: number of samples of all ranks together.
        micro_batch_size: samples of a micro-batch.
    """
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    for round_ in range(count_batches(samples, micro_batch_size)):
        first = (round_ * ranks + rank) * micro_batch_size
        indices = range(first, first + micro_batch_size)
        made = batch(dataset, [i % samples for i in indices])
        for row, index in enumerate(indices):
            if index >= samples:
                made["loss_mask"][row] = 0
        yield made


def counted_share(dataset: Dataset, samples: int, micro_batch_size: int, bar: Progress) -> Iterator[Batch]:
    """Micro-batches of `share`, each of which is counted on the progress bar when it is used up.

    Args:
        dataset: dataset whose first samples are used.
        samples: number of samples of all ranks together.
        micro_batch_size: samples of a micro-batch.
        bar: progress bar.
    """
    for made in share(dataset, samples, micro_batch_size):
        yield made
        bar.update()
