"""Ablation of sorting before any training: networks with half of one axis, unsorted, in random order, and sorted (Table 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flextron_mcore.axes import HEADS, network_axes
from flextron_mcore.choosing import Network
from flextron_mcore.config import ModelConfig
from flextron_mcore.evaluation.perplexity import evaluate, mean, perplexity
from flextron_mcore.runtime.progress import Progress
from flextron_mcore.space import ElasticSpace


@dataclass(frozen=True)
class AblationNetwork:
    """Network in which one axis is about half, or the full model.

    Attributes:
        name: name in tables, such as "6 of 9 heads".
        axis: name of the axis; "" for the full model.
        network: the network; None for the full model.
    """

    name: str
    axis: str
    network: Network


def ablation_networks(model: ModelConfig, space: ElasticSpace) -> list[AblationNetwork]:
    """Full model, then for each axis the network in which only this axis is about half.

    Axes are heads, neurons, and the hidden size and depth if they are elastic. About half is the candidate nearest to half of the
    full size.
    """
    networks = [AblationNetwork("full (baseline)", "", None)]
    for axis in [*space.layer_axes, *(axis for axis in network_axes() if space.elastic(axis))]:
        size = _half(space.sizes[axis.name])
        kind = axis.short if axis.of_layer else axis.short.lower()
        unit = axis.unit if axis.unit in kind.lower() else f"{kind} {axis.unit}"
        name = f"{size} of {axis.full(model)} {unit}"
        networks.append(AblationNetwork(name, axis.name, space.uniform(model, **{axis.name: size})))
    return networks


def unit_networks(model: ModelConfig, spaces: Mapping[str, ElasticSpace]) -> dict[str, list[AblationNetwork]]:
    """{attention unit: networks with fewer heads in every layer} for the numbers of heads that all units can have.

    Empty without such a number. spaces: {attention unit: space}.
    """
    common = sorted(set.intersection(*(set(space.sizes[HEADS.name][:-1]) for space in spaces.values())))
    if not common:
        return {}
    return {
        unit: [
            AblationNetwork(f"{heads} of {HEADS.full(model)} heads by {unit}", HEADS.name, space.uniform(model, heads=heads))
            for heads in common
        ]
        for unit, space in spaces.items()
    }


def units_line(compared: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Losses of the networks of each attention unit, in words. compared: {unit: rows of `ablation_rows`}."""
    return "; ".join(f"{row['setup']} {row['loss']:.3f}" for rows in compared.values() for row in rows) + " nats per token"


def ablation_rows(
    order: str,
    model: Sequence[torch.nn.Module],
    networks: Sequence[AblationNetwork],
    scores: Mapping[str, str],
    datasets: Mapping[str, torch.utils.data.Dataset],
    seq_length: int,
    micro_batch_size: int,
    batches: int,
) -> list[dict[str, Any]]:
    """Rows of metrics.json, one for each network. Call on all ranks.

    A row is {"setup": name of the network, "order", "score": importance score of its axis, "loss": in nats per token, mean over
    domains, "perplexity": exp(loss)}. The score is "" for the full model, for an axis that is not elastic, and in an order that
    is not `sorted`.

    Args:
        order: name of the order that the units are in (unsorted, random, sorted), for the rows.
        model: this rank's virtual-pipeline chunks.
        networks: networks from `ablation_networks` or `unit_networks`.
        scores: {axis: name of its importance score}.
        datasets: {domain: dataset}.
        seq_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
        batches: number of micro-batches of each domain.
    """
    evaluated = {network.name: network.network for network in networks}
    with Progress(total=len(networks) * len(datasets), desc=f"importance, losses {order}", unit="evaluation") as bar:
        size = batches * micro_batch_size
        losses = evaluate(model, datasets, evaluated, seq_length, micro_batch_size, size, lambda _: bar.update())
    rows = []
    for network in networks:
        loss = mean(losses[network.name])
        score = scores.get(network.axis, "") if order == "sorted" else ""
        rows.append({"setup": network.name, "order": order, "score": score, "loss": loss, "perplexity": perplexity(loss)})
    return rows


def no_better_than_random(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentence for each network whose loss in sorted order is not below that in random order. rows: from `ablation_rows`."""
    chance = {row["setup"]: row["loss"] for row in rows if row["order"] == "random"}
    return [
        f"{row['setup']} sorted by {row['score']} lose {row['loss']:.3f} nats per token, no better than in random order "
        f"({chance[row['setup']]:.3f}): try another score.KEY"
        for row in rows
        if row["order"] == "sorted" and row["score"] and row["loss"] >= chance.get(row["setup"], math.inf)
    ]


def _half(candidates: Sequence[int]) -> int:
    """Candidate nearest to half of the full size."""
    return min(candidates, key=lambda size: abs(size - candidates[-1] / 2))
