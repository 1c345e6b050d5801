"""Ablation of sorting before any training: networks with half of one axis, unsorted and sorted (Flextron, Table 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flextron_mcore.axes import HIDDEN_SIZE
from flextron_mcore.choosing import Network
from flextron_mcore.config import ModelConfig
from flextron_mcore.evaluation.perplexity import evaluate, mean, perplexity
from flextron_mcore.runtime.progress import Progress
from flextron_mcore.space import ElasticSpace


def ablation_networks(model: ModelConfig, space: ElasticSpace) -> dict[str, Network]:
    """{name: network}: the full model (None), and for each width the network in which only this width is about half.

    Widths are heads and neurons, and the hidden size if it is elastic. About half is the candidate nearest to half of the full
    size.
    """
    networks: dict[str, Network] = {"full (baseline)": None}
    for axis in space.layer_axes:
        size = _half(space.sizes[axis.name])
        unit = axis.unit if axis.unit in axis.short.lower() else f"{axis.short} {axis.unit}"
        networks[f"{size} of {axis.full(model)} {unit}"] = space.uniform(model, **{axis.name: size})
    if space.elastic(HIDDEN_SIZE):
        size = _half(space.hidden_size)
        networks[f"{size} of {model.hidden_size} hidden channels"] = space.uniform(model, hidden_size=size)
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
    """Rows of metrics.json, one for each network. Call on all ranks.

    A row is {"setup": name of the network, "order", "loss": in nats per token, mean over domains, "perplexity": exp(loss)}.

    Args:
        order: name of the order that the units are in (unsorted, sorted), for the rows.
        model: this rank's virtual-pipeline chunks.
        networks: {name: network}, from `ablation_networks`.
        datasets: {domain: dataset}.
        seq_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
        batches: number of micro-batches of each domain.
    """
    with Progress(total=len(networks) * len(datasets), desc=f"importance, losses {order}", unit="evaluation") as bar:
        size = batches * micro_batch_size
        losses = evaluate(model, datasets, networks, seq_length, micro_batch_size, size, lambda _: bar.update())
    means = {name: mean(domains) for name, domains in losses.items()}
    return [{"setup": name, "order": order, "loss": loss, "perplexity": perplexity(loss)} for name, loss in means.items()]


def _half(candidates: Sequence[int]) -> int:
    """Candidate nearest to half of the full size."""
    return min(candidates, key=lambda size: abs(size - candidates[-1] / 2))
