"""Loss of sub-networks on validation data, in nats per token: exact sums in float64, no randomness (T7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from megatron.core import parallel_state

from flextron_mcore.data.blend import batch
from flextron_mcore.pipeline.networks import Batch, run_networks
from flextron_mcore.space import SubNetwork


def evaluate(
    model: Sequence[torch.nn.Module],
    datasets: Mapping[str, torch.utils.data.Dataset],
    networks: Mapping[str, SubNetwork | None],
    seq_length: int,
    micro_batch_size: int,
    limit: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, float]]:
    """{network: {domain: loss}}: mean over the tokens of each domain's samples, or of its first `limit` micro-batches.

    Call on all ranks; samples are shared out over the data-parallel ranks.
    """
    training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    losses: dict[str, dict[str, float]] = {name: {} for name in networks}
    with torch.no_grad():
        for domain, dataset in datasets.items():
            samples = len(dataset) if limit is None else min(len(dataset), limit * micro_batch_size)
            for name, network in networks.items():
                total = run_networks(
                    model,
                    lambda d=dataset, n=samples: _batches(d, n, micro_batch_size),
                    _rounds(samples, micro_batch_size),
                    [network],
                    seq_length,
                    micro_batch_size,
                    forward_only=True,
                )
                losses[name][domain] = (total[0, 0] / total[0, 1]).item()
                if progress:
                    progress(f"{domain}: {name}")
    for chunk, was_training in zip(model, training, strict=True):
        chunk.train(was_training)
    return losses


def _rounds(samples: int, micro_batch_size: int) -> int:
    """Micro-batches each data-parallel rank runs."""
    return -(-samples // (micro_batch_size * parallel_state.get_data_parallel_world_size()))


def _batches(dataset: torch.utils.data.Dataset, samples: int, micro_batch_size: int) -> Iterator[Batch]:
    """This rank's micro-batches, all of the same size; what is beyond the last sample is repeated and does not count."""
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    for round_ in range(_rounds(samples, micro_batch_size)):
        first = (round_ * ranks + rank) * micro_batch_size
        indices = range(first, first + micro_batch_size)
        made = batch(dataset, [i % samples for i in indices])
        for row, index in enumerate(indices):
            if index >= samples:
                made["loss_mask"][row] = 0
        yield made


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def mean(losses: Mapping[str, float]) -> float:
    """Mean over domains."""
    return sum(losses.values()) / len(losses)
