"""Choices: a space as a list of choices with candidates, for routers, selectors and tables. No torch import.

Every axis of a layer is a choice of every layer, in the order of the layers and of the axes; such a choice is a block of the
network (attention, MLP). Choices of all axes have those of the network (hidden size, depth) before them, and may have one
choice of each of a layer's axes for all layers. A network is one candidate index a choice.

Shape suffixes: N choices, K candidates of the one that has most.
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
    """The choices of `space` over `model`; candidates are in the space's order, smallest first.

    all_axes: hidden size and depth are chosen too; without, networks have all channels and layers. uniform: one choice for all
    layers.
    """

    model: ModelConfig
    space: ElasticSpace
    all_axes: bool = False
    uniform: bool = False

    @property
    def network_axes(self) -> list[Axis]:
        """The axes of the network that are chosen."""
        return network_axes() if self.all_axes else []

    @property
    def axes(self) -> list[Axis]:
        """The axis of each choice."""
        return self.network_axes + self.space.layer_axes * (1 if self.uniform else self.model.num_layers)

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Candidates of each choice."""
        return [self.space.sizes[axis.name] for axis in self.axes]

    @property
    def count(self) -> int:
        """N."""
        return len(self.axes)

    @property
    def exists_NK(self) -> np.ndarray:
        """True where a choice has a candidate."""
        return table([[True] * len(sizes) for sizes in self.sizes], False)

    def rows(self, layers: Iterable[int]) -> list[int]:
        """The numbers of the choices of these layers."""
        first, count = len(self.network_axes), len(self.space.layer_axes)
        return [first + (0 if self.uniform else layer) * count + i for layer in layers for i in range(count)]

    @property
    def blocks(self) -> list[tuple[int, str]]:
        """(layer, name of the axis) of each choice of a layer, where every layer has its own."""
        return [(layer, axis.name) for layer in range(self.model.num_layers) for axis in self.space.layer_axes]

    def costs_NK(self, cost: Cost) -> np.ndarray:
        """Cost that each candidate of a layer adds to a network, 0 where there is none; `cost.constant` comes on top."""
        costs = {axis.name: [0.0] for axis in self.network_axes} | dict(cost.candidates)
        return table([costs[axis.name] for axis in self.axes], 0.0, self.exists_NK.shape[1])

    def network(self, indices_N: Sequence[int]) -> SubNetwork:
        """The sub-network of these candidates; the candidates of layers that it skips do not matter."""
        space, count = self.space, len(self.space.layer_axes)
        sizes = [candidates[index] for candidates, index in zip(self.sizes, indices_N, strict=True)]
        chosen = dict(zip((axis.name for axis in self.network_axes), sizes, strict=False))
        rest = sizes[len(chosen) :] * (self.model.num_layers if self.uniform else 1)
        layers = [space.layer_choice(self.model, *rest[i : i + count]) for i in range(0, len(rest), count)]
        return space.network(self.model, layers, **chosen)

    def indices(self, net: SubNetwork) -> list[int]:
        """The candidates of a member of the space whose layers are the most important; the largest for layers that it skips."""
        largest = self.space.layer_choice(self.model)
        layers = net.executed_layers[:1] if self.uniform else [layer if layer.executed else largest for layer in net.layers]
        chosen: list[SubNetwork | LayerChoice] = [net] * len(self.network_axes)
        chosen += [layer for layer in layers for _ in self.space.layer_axes]
        parts = zip(self.axes, self.sizes, chosen, strict=True)
        return [sizes.index(axis.size(part)) for axis, sizes, part in parts]

    def replaced(self, net: SubNetwork, choice: int, candidate: int) -> SubNetwork:
        """`net` with another candidate of one choice."""
        indices = self.indices(net)
        indices[choice] = candidate
        return self.network(indices)

    def counted_N(self, net: SubNetwork) -> np.ndarray:
        """True for the choices that matter to a network: those of layers that it skips do not."""
        counted_N = np.ones(self.count, dtype=bool)
        if not self.uniform:
            counted_N[self.rows(i for i, layer in enumerate(net.layers) if not layer.executed)] = False
        return counted_N

    def total(self, values_NK: np.ndarray, net: SubNetwork) -> float:
        """The sum of the values of a network's candidates, without layers that it skips."""
        values_N = np.take_along_axis(values_NK, np.array(self.indices(net))[:, None], 1)[:, 0]
        return float(values_N[self.counted_N(net)].sum())

    def least(self, cost: Cost) -> SubNetwork:
        """The cheapest network."""

        def smallest(hidden_size: int) -> SubNetwork:
            costs = cost.at(hidden_size).candidates
            sizes = [self.space.sizes[axis.name][int(np.argmin(costs[axis.name]))] for axis in self.space.layer_axes]
            named = {"hidden_size": hidden_size, "depth": self.space.depth[0]} if self.all_axes else {}
            return self.space.uniform(self.model, *sizes, **named)

        return min(map(smallest, self.space.hidden_size if self.all_axes else self.space.hidden_size[-1:]), key=cost.of)

    def moves_NK(self, net: SubNetwork, cost: Cost) -> np.ndarray:
        """Cost that `net` would have more with another candidate of one choice, of the same hidden size and layers.

        Infinite for those that it has, those of other choices, and where there is no candidate.
        """
        costs_NK = self.costs_NK(cost.at(net.hidden_size)) * (net.depth if self.uniform else 1)
        own_N1 = np.array(self.indices(net))[:, None]
        may_N = self.counted_N(net)
        may_N[: len(self.network_axes)] = False
        others_NK = self.exists_NK & may_N[:, None] & (np.arange(costs_NK.shape[1]) != own_N1)
        return np.where(others_NK, costs_NK - np.take_along_axis(costs_NK, own_N1, 1), np.inf)


def table(rows: Sequence[Sequence], fill: float | bool, width: int = 0) -> np.ndarray:
    """Rows of different lengths as one array, of so many columns at least."""
    width = max(width, *map(len, rows))
    return np.array([[*row, *[fill] * (width - len(row))] for row in rows])
