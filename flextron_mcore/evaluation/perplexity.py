"""Loss of networks on data, in nats per token, summed in float64, and its perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from flextron_mcore.choosing import Network
from flextron_mcore.pipeline.batches import count_batches, share
from flextron_mcore.pipeline.networks import run_networks


def evaluate(
    model: Sequence[torch.nn.Module],
    datasets: Mapping[str, torch.utils.data.Dataset],
    networks: Mapping[str, Network],
    seq_length: int,
    micro_batch_size: int,
    max_samples: int | None = None,
    progress: Callable[[str], None] | None = None,
    drop: Callable[[], bool] | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate networks: {name of the network: {domain: loss in nats per token}}, the same on all ranks.

    A loss is the mean over all tokens that count in the loss. Call on all ranks.

    Args:
        model: this rank's virtual-pipeline chunks (usually one); their mode (training or evaluation) is restored.
        datasets: {domain: dataset}. Samples are distributed over the data-parallel ranks.
        networks: {name: network}; None is the full model.
        seq_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
        max_samples: number of samples of each domain, the first ones; None for all.
        progress: called with "DOMAIN: NETWORK" after each evaluation of a network on a domain.
        drop: function that returns True if the rest is to be skipped (`run_networks`); the losses are void then.
    """
    training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    losses: dict[str, dict[str, float]] = {name: {} for name in networks}
    with torch.no_grad():
        for domain, dataset in datasets.items():
            samples = min(len(dataset), max_samples or len(dataset))
            for name, network in networks.items():
                total = run_networks(
                    model,
                    lambda d=dataset, n=samples: share(d, n, micro_batch_size),
                    count_batches(samples, micro_batch_size),
                    [network],
                    seq_length,
                    micro_batch_size,
                    forward_only=True,
                    drop=drop,
                )
                losses[name][domain] = (total[0, 0] / total[0, 1]).item()
                if progress:
                    progress(f"{domain}: {name}")
    for chunk, was_training in zip(model, training, strict=True):
        chunk.train(was_training)
    return losses


def perplexity(loss: float) -> float:
    """Perplexity exp(loss) of a loss in nats per token; infinite above 700."""
    return math.exp(loss) if loss < 700 else math.inf


def mean(losses: Mapping[str, float]) -> float:
    """Mean loss over domains, each with the same weight. losses: {domain: loss}."""
    return sum(losses.values()) / len(losses)
