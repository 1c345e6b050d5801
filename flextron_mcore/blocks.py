"""A space as a list of blocks with candidates: what routers choose from and selectors optimise over. No torch import.

Block 2 l is the attention of layer l, block 2 l + 1 its MLP. A network is one candidate index a block.

Shape suffixes: N blocks, K candidates of the block that has most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        return self._table([[True] * len(sizes) for sizes in self.sizes], False)

    def costs_NK(self, cost: Cost) -> np.ndarray:
        """What each candidate adds to a network's cost; 0 where there is none. `cost.constant` comes on top."""
        return self._table([getattr(cost, axis) for _ in range(self.model.num_layers) for axis in AXES], 0.0)

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

    def replaced(self, net: SubNetwork, block: int, candidate: int) -> SubNetwork:
        """`net` with another candidate in one block."""
        indices = self.indices(net)
        indices[block] = candidate
        return self.network(indices)

    def _table(self, rows: Sequence[Sequence], fill: float | bool) -> np.ndarray:
        width = max(map(len, rows))
        return np.array([[*row, *[fill] * (width - len(row))] for row in rows])
