"""Validation losses of a checkpoint's networks, cached so that each network is evaluated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from flextron_mcore.evaluation.perplexity import evaluate, mean
from flextron_mcore.space import SubNetwork


class Evaluator:
    """Validation losses of a model's networks, by domain. A network is evaluated when its loss is first requested.

    Call the methods on all ranks, for the same networks.

    Args:
        model: this rank's virtual-pipeline chunks (usually one).
        datasets: {domain: dataset}.
        seq_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
        batches: largest number of micro-batches of each domain, all ranks together; None for all.
        progress: called with "DOMAIN: NETWORK" after each evaluation of a network on a domain.
    """

    def __init__(
        self,
        model: Sequence[torch.nn.Module],
        datasets: Mapping[str, torch.utils.data.Dataset],
        seq_length: int,
        micro_batch_size: int,
        batches: int | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.datasets, self.progress = model, datasets, progress
        self.seq_length, self.micro_batch_size = seq_length, micro_batch_size
        self.limit = batches and batches * micro_batch_size
        self._found: dict[SubNetwork, dict[str, float]] = {}

    @property
    def samples(self) -> int:
        """Number of samples that every network is evaluated on, over all domains."""
        return sum(min(len(dataset), self.limit or len(dataset)) for dataset in self.datasets.values())

    def losses(self, networks: Sequence[SubNetwork]) -> list[dict[str, float]]:
        """{domain: loss in nats per token} of each network. Call on all ranks, for the same networks."""
        new = {str(i): net for i, net in enumerate(dict.fromkeys(networks)) if net not in self._found}
        found = evaluate(self.model, self.datasets, new, self.seq_length, self.micro_batch_size, self.limit, self.progress)
        self._found |= {net: found[name] for name, net in new.items()}
        return [self._found[net] for net in networks]

    def means(self, networks: Sequence[SubNetwork]) -> list[float]:
        """Loss of each network in nats per token, averaged over domains. Call on all ranks, for the same networks."""
        return [mean(losses) for losses in self.losses(networks)]

    def mean(self, net: SubNetwork) -> float:
        """Loss of one network in nats per token, averaged over domains. Call on all ranks, for the same network."""
        return self.means([net])[0]
