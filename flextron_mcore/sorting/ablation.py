"""Ablation of sorting before any training: networks of half of an axis, unsorted and sorted (Flextron, Table 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flextron_mcore.axes import HIDDEN_SIZE
from flextron_mcore.choosing import Network
from flextron_mcore.config import ModelConfig
from flextron_mcore.evaluation.perplexity import evaluate, mean, perplexity
from flextron_mcore.space import ElasticSpace


def ablation_networks(model: ModelConfig, space: ElasticSpace) -> dict[str, Network]:
    """The full model, and for each elastic width the network in which it alone is halved."""
    networks: dict[str, Network] = {"full (baseline)": None}
    for axis in space.layer_axes:
        networks[f"50% {axis.short.lower()}"] = space.uniform(model, **{axis.name: _half(space.sizes[axis.name])})
    if space.elastic(HIDDEN_SIZE):
        networks["50% hidden size"] = space.uniform(model, hidden_size=_half(space.hidden_size))
    return networks


def ablation_rows(
    order: str,
    model: Sequence[torch.nn.Module],
    networks: Mapping[str, Network],
    datasets: Mapping[str, torch.utils.data.Dataset],
    seq_length: int,
    micro_batch_size: int,
    batches: int,
) -> list[dict[str, Any]]:
    """A row for each network: loss [nats per token] and perplexity, mean over domains. batches: micro-batches of a domain."""
    losses = evaluate(model, datasets, networks, seq_length, micro_batch_size, batches * micro_batch_size)
    means = {name: mean(domains) for name, domains in losses.items()}
    return [{"setup": name, "order": order, "loss": loss, "perplexity": perplexity(loss)} for name, loss in means.items()]


def _half(candidates: Sequence[int]) -> int:
    """The candidate nearest to half the full size."""
    return min(candidates, key=lambda size: abs(size - candidates[-1] / 2))
