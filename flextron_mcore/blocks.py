"""A space as a list of blocks with candidates: what routers choose from and selectors optimise over. No torch import.

Of `Blocks`, block 2 l is the attention of layer l, block 2 l + 1 its MLP. A network is one candidate index a block. `Axes` has
the hidden size and the depth before them, and may have one choice of heads and neurons for all layers.

Shape suffixes: N blocks or axes, K candidates of the one that has most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flextron_mcore.config import ModelConfig
from flextron_mcore.cost import Cost
from flextron_mcore.space import ElasticSpace, SubNetwork

AXES = ("heads", "ffn_hidden_size")


@dataclass(frozen=True)
class Blocks:
    """The blocks of `space` over `model`; candidates are in the space's order, smallest first."""

    model: ModelConfig
    space: ElasticSpace

    @property
    def count(self) -> int:
        """N."""
        return 2 * self.model.num_layers

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Candidates of each block: query heads, or neurons."""
        return [getattr(self.space, axis) for _ in range(self.model.num_layers) for axis in AXES]

    @property
    def exists_NK(self) -> np.ndarray:
        """True where a block has a candidate."""
        return table([[True] * len(sizes) for sizes in self.sizes], False)

    def costs_NK(self, cost: Cost) -> np.ndarray:
        """What each candidate adds to a network's cost; 0 where there is none. `cost.constant` comes on top."""
        return table([getattr(cost, AXES[n % len(AXES)]) for n in range(self.count)], 0.0)

    def mixed_costs_N3(self, cost: Cost) -> np.ndarray:
        """What each of MIXED adds to the cost of a block whose tokens choose for themselves."""
        nothing = (0.0,) * len(MIXED)
        return np.array([cost.mixed[n % len(AXES)] or nothing for n in range(self.count)])

    @property
    def size_NK(self) -> np.ndarray:
        """Each candidate's share of its block."""
        return table([[size / sizes[-1] for size in sizes] for sizes in self.sizes], 1.0)

    def network(self, indices_N: Sequence[int]) -> SubNetwork:
        """The sub-network of these candidates."""
        heads, widths = self.space.heads, self.space.ffn_hidden_size
        pairs = zip(indices_N[::2], indices_N[1::2], strict=True)
        return SubNetwork(
            self.model.hidden_size, tuple(self.space.layer_choice(self.model, heads[a], widths[m]) for a, m in pairs)
        )

    def indices(self, net: SubNetwork) -> list[int]:
        """The candidates of a member of the space."""
        pairs = [(layer.num_attention_heads, layer.ffn_hidden_size) for layer in net.layers]
        return [sizes.index(size) for sizes, size in zip(self.sizes, [x for pair in pairs for x in pair], strict=True)]

    def total(self, values_NK: np.ndarray, net: SubNetwork) -> float:
        """The sum of the values of a network's candidates."""
        return float(np.take_along_axis(values_NK, np.array(self.indices(net))[:, None], 1).sum())

    def least(self, cost: Cost) -> SubNetwork:
        """The cheapest network."""
        return self.network(np.where(self.exists_NK, self.costs_NK(cost), np.inf).argmin(-1).tolist())

    def moves_NK(self, net: SubNetwork, cost: Cost) -> np.ndarray:
        """What `net` would cost more with another candidate in one block; infinite for those that it has, or nobody has."""
        return _moves_NK(self.costs_NK(cost), self.exists_NK, self.indices(net))

    def replaced(self, net: SubNetwork, block: int, candidate: int) -> SubNetwork:
        """`net` with another candidate in one block."""
        indices = self.indices(net)
        indices[block] = candidate
        return self.network(indices)


# What adds to a block's cost where its tokens differ: that they do; each level beyond the first that occurs; and the share of the
# block that lies between a token's own level and the highest that occurs (with `kv_policy=full` its keys and values are written).
MIXED = ("differ", "level", "above")


def mixed_N3(share_NK: Any, size_NK: np.ndarray, occurs: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
    """How much there is of each of MIXED in every block: [N] each. For NumPy arrays and tensors.

    share_NK: the share of tokens at each level. size_NK: what share of the block that is. occurs: how much something occurs that
    a share of the tokens have, 0 for none of them and 1 for many.
    """
    differ_N = 1 - (1 - occurs(1 - share_NK)).sum(-1)  # no level has all tokens
    further_N = occurs(share_NK).sum(-1) - 1
    at_least_NK = 1 - share_NK.cumsum(-1) + share_NK
    step_NK = size_NK - np.pad(size_NK, ((0, 0), (1, 0)))[:, :-1]
    if not isinstance(share_NK, np.ndarray):
        size_NK, step_NK = (share_NK.new_tensor(values) for values in (size_NK, step_NK))
    return differ_N, further_N, (occurs(at_least_NK) * step_NK - share_NK * size_NK).sum(-1)


@dataclass(frozen=True)
class Axes:
    """All axes of `space` over `model`: hidden size, depth, and heads and neurons of every layer.

    uniform: heads and neurons are one choice each for all layers. Candidates are in the space's order, smallest first.
    """

    model: ModelConfig
    space: ElasticSpace
    uniform: bool

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Candidates of each axis."""
        pairs = 1 if self.uniform else self.model.num_layers
        return [self.space.hidden_size, self.space.depth, *(getattr(self.space, axis) for _ in range(pairs) for axis in AXES)]

    @property
    def count(self) -> int:
        """N."""
        return len(self.sizes)

    @property
    def exists_NK(self) -> np.ndarray:
        """True where an axis has a candidate."""
        return table([[True] * len(sizes) for sizes in self.sizes], False)

    def network(self, indices_N: Sequence[int]) -> SubNetwork:
        """The sub-network of these candidates; what is chosen for layers that it skips does not matter."""
        space, layers = self.space, self.model.num_layers
        hidden, depth, *rest = indices_N
        pairs = list(zip(rest[::2], rest[1::2], strict=True)) * (layers if self.uniform else 1)
        choices = [space.layer_choice(self.model, space.heads[a], space.ffn_hidden_size[m]) for a, m in pairs]
        return space.network(self.model, choices, space.hidden_size[hidden], space.depth[depth])

    def indices(self, net: SubNetwork) -> list[int]:
        """The candidates of a member of the space whose layers are the most important; the largest for layers that it skips."""
        space = self.space
        largest = space.layer_choice(self.model, space.heads[-1], space.ffn_hidden_size[-1])
        executed = [layer for layer in net.layers if layer.executed]
        layers = executed[:1] if self.uniform else [layer if layer.executed else largest for layer in net.layers]
        found = [space.hidden_size.index(net.hidden_size), space.depth.index(len(executed))]
        for layer in layers:
            found += [space.heads.index(layer.num_attention_heads), space.ffn_hidden_size.index(layer.ffn_hidden_size)]
        return found

    def total(self, values_NK: np.ndarray, net: SubNetwork) -> float:
        """The sum of the values of a network's candidates, without layers that it skips."""
        values_N = np.take_along_axis(values_NK, np.array(self.indices(net))[:, None], 1)[:, 0]
        counted_N = np.ones(self.count, dtype=bool)
        if not self.uniform:
            counted_N[2:] = np.repeat([layer.executed for layer in net.layers], 2)
        return float(values_N[counted_N].sum())

    def least(self, cost: Cost) -> SubNetwork:
        """The cheapest network."""

        def smallest(hidden: int) -> SubNetwork:
            part = cost.at(self.space.hidden_size[hidden])
            pair = [int(np.argmin(part.heads)), int(np.argmin(part.ffn_hidden_size))]
            return self.network([hidden, 0, *pair * ((self.count - 2) // 2)])

        return min(map(smallest, range(len(self.space.hidden_size))), key=cost.of)

    def moves_NK(self, net: SubNetwork, cost: Cost) -> np.ndarray:
        """As `Blocks.moves_NK`, of the same hidden size and layers: infinite for others."""
        executed_L = np.array([layer.executed for layer in net.layers])
        part = cost.at(net.hidden_size)
        shared = executed_L.sum() if self.uniform else 1
        rows = [[size * shared for size in getattr(part, axis)] for axis in AXES] * ((self.count - 2) // 2)
        costs_NK = table([self.space.hidden_size, self.space.depth, *rows], 0.0)
        may_N = np.repeat([False, *(executed_L if not self.uniform else [True])], 2)
        return _moves_NK(costs_NK, self.exists_NK & may_N[:, None], self.indices(net))


def _moves_NK(costs_NK: np.ndarray, may_NK: np.ndarray, indices_N: Sequence[int]) -> np.ndarray:
    own_N1 = np.array(indices_N)[:, None]
    others_NK = may_NK & (np.arange(costs_NK.shape[1]) != own_N1)
    return np.where(others_NK, costs_NK - np.take_along_axis(costs_NK, own_N1, 1), np.inf)


def table(rows: Sequence[Sequence], fill: float | bool) -> np.ndarray:
    """Rows of different lengths as one array."""
    width = max(map(len, rows))
    return np.array([[*row, *[fill] * (width - len(row))] for row in rows])
