"""Elastic space as a list of choices, for routers, selectors and tables. No torch import.

A choice picks one candidate of an axis. Every layer has a choice for each layer axis, ordered by layer, then by axis; such a
choice is also called a block (attention, MLP). With all axes, the choices of the network (hidden size, depth) come first. A
sub-network is then a list of candidate indices, one a choice.

Shape suffixes: N choices, K the largest number of candidates of a choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flextron_mcore.axes import Axis, network_axes
from flextron_mcore.config import ModelConfig
from flextron_mcore.cost import Cost
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork


@dataclass(frozen=True)
class Choices:
    """Elastic space as a list of choices, each of which picks one candidate (size) of an axis. Candidates are smallest first.

    Attributes:
        model: architecture of the full model.
        space: candidates of every axis.
        all_axes: True if hidden size and depth are choices, too; else networks have all channels and layers.
        uniform: True if all layers share one choice for each layer axis, so that networks have the same widths in every layer.
    """

    model: ModelConfig
    space: ElasticSpace
    all_axes: bool = False
    uniform: bool = False

    @property
    def network_axes(self) -> list[Axis]:
        """Axes with one size for the whole network that are choices: hidden size and depth, or without `all_axes` none."""
        return network_axes() if self.all_axes else []

    @property
    def axes(self) -> list[Axis]:
        """Axis of each of the N choices."""
        return self.network_axes + self.space.layer_axes * (1 if self.uniform else self.model.num_layers)

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Candidates (sizes) of each choice, smallest first."""
        return [self.space.sizes[axis.name] for axis in self.axes]

    @property
    def count(self) -> int:
        """Number N of choices."""
        return len(self.axes)

    @property
    def exists_NK(self) -> np.ndarray:
        """[N, K] array, True for candidates that exist: a choice may have fewer than K candidates."""
        return table([[True] * len(sizes) for sizes in self.sizes], False)

    def rows(self, layers: Iterable[int]) -> list[int]:
        """Indices of the choices that belong to these layers, layer by layer; with `uniform` the shared ones for every layer."""
        first, count = len(self.network_axes), len(self.space.layer_axes)
        return [first + (0 if self.uniform else layer) * count + i for layer in layers for i in range(count)]

    @property
    def blocks(self) -> list[tuple[int, str]]:
        """(layer, name of the axis) of each block, in the order of the choices; only for choices without `uniform`."""
        return [(layer, axis.name) for layer in range(self.model.num_layers) for axis in self.space.layer_axes]

    def costs_NK(self, cost: Cost) -> np.ndarray:
        """[N, K] array of the cost that each candidate adds to `cost.constant` in one layer, also with `uniform`.

        It is 0 for missing candidates and for hidden size and depth.
        """
        costs = {axis.name: [0.0] for axis in self.network_axes} | dict(cost.candidates)
        return table([costs[axis.name] for axis in self.axes], 0.0, self.exists_NK.shape[1])

    def network(self, indices_N: Sequence[int]) -> SubNetwork:
        """Sub-network in which choice n takes its candidate indices_N[n], from 0. Indices of skipped layers are ignored."""
        space, count = self.space, len(self.space.layer_axes)
        sizes = [candidates[index] for candidates, index in zip(self.sizes, indices_N, strict=True)]
        chosen = dict(zip((axis.name for axis in self.network_axes), sizes, strict=False))
        rest = sizes[len(chosen) :] * (self.model.num_layers if self.uniform else 1)
        layers = [space.layer_choice(self.model, *rest[i : i + count]) for i in range(0, len(rest), count)]
        return space.network(self.model, layers, **chosen)

    def indices(self, net: SubNetwork) -> list[int]:
        """Candidate index of each choice in a network of the space, the inverse of `network`; the largest for skipped layers."""
        largest = self.space.layer_choice(self.model)
        layers = net.executed_layers[:1] if self.uniform else [layer if layer.executed else largest for layer in net.layers]
        chosen: list[SubNetwork | LayerChoice] = [net] * len(self.network_axes)
        chosen += [layer for layer in layers for _ in self.space.layer_axes]
        parts = zip(self.axes, self.sizes, chosen, strict=True)
        return [sizes.index(axis.size(part)) for axis, sizes, part in parts]

    def replaced(self, net: SubNetwork, choice: int, candidate: int) -> SubNetwork:
        """Sub-network `net` with another candidate in one choice.

        Args:
            net: sub-network.
            choice: index of the choice.
            candidate: index of the new candidate.
        """
        indices = self.indices(net)
        indices[choice] = candidate
        return self.network(indices)

    def counted_N(self, net: SubNetwork) -> np.ndarray:
        """[N] array, True for choices that affect `net`; false for choices of skipped layers."""
        counted_N = np.ones(self.count, dtype=bool)
        if not self.uniform:
            counted_N[self.rows(i for i, layer in enumerate(net.layers) if not layer.executed)] = False
        return counted_N

    def total(self, values_NK: np.ndarray, net: SubNetwork) -> float:
        """Sum of `values_NK` over the candidates that a network uses, without skipped layers."""
        values_N = np.take_along_axis(values_NK, np.array(self.indices(net))[:, None], 1)[:, 0]
        return float(values_N[self.counted_N(net)].sum())

    def least(self, cost: Cost) -> SubNetwork:
        """Cheapest sub-network that the choices can give, with the same widths in every layer."""

        def smallest(hidden_size: int) -> SubNetwork:
            costs = cost.at(hidden_size).candidates
            sizes = [self.space.sizes[axis.name][int(np.argmin(costs[axis.name]))] for axis in self.space.layer_axes]
            named = {"hidden_size": hidden_size, "depth": self.space.depth[0]} if self.all_axes else {}
            return self.space.uniform(self.model, *sizes, **named)

        return min(map(smallest, self.space.hidden_size if self.all_axes else self.space.hidden_size[-1:]), key=cost.of)

    def moves_NK(self, net: SubNetwork, cost: Cost) -> np.ndarray:
        """[N, K] array of the change of the cost when one block of `net` gets another candidate.

        Infinite for the current and for missing candidates, for skipped layers, and for hidden size and depth.
        """
        costs_NK = self.costs_NK(cost.at(net.hidden_size)) * (net.depth if self.uniform else 1)
        own_N1 = np.array(self.indices(net))[:, None]
        may_N = self.counted_N(net)
        may_N[: len(self.network_axes)] = False
        others_NK = self.exists_NK & may_N[:, None] & (np.arange(costs_NK.shape[1]) != own_N1)
        return np.where(others_NK, costs_NK - np.take_along_axis(costs_NK, own_N1, 1), np.inf)


def table(rows: Sequence[Sequence], fill: float | bool, width: int = 0) -> np.ndarray:
    """Array [rows, columns] from rows of different lengths; as many columns as the longest row, at least `width`.

    Args:
        rows: the rows.
        fill: value of missing entries.
        width: least number of columns.
    """
    width = max(width, *map(len, rows))
    return np.array([[*row, *[fill] * (width - len(row))] for row in rows])
