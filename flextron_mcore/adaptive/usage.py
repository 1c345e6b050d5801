"""Usage of levels: the share of tokens at each level of each block, and the cost of a pass with such shares. No torch import.

Levels count a block's candidates from 0, the smallest. A pass whose tokens all have the same levels is a sub-network. Tokens that
differ add a routing overhead: every level that occurs is a product of its own (layers/tokens/).

Shape suffixes: N blocks, K candidates, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from flextron_mcore.choices import Choices, table
from flextron_mcore.cost import Cost

if TYPE_CHECKING:
    from torch import Tensor
Array = TypeVar("Array", np.ndarray, "Tensor")

# Routing overhead of a block: tokens differ at all; each level beyond the first that occurs; and the share of the block between a
# token's own level and the highest that occurs (with `kv_policy=full` its keys and values are computed).
OVERHEADS = ("differ", "level", "above")


def overheads_N3(share_NK: Array, size_NK: np.ndarray, occurs: Callable[[Array], Array]) -> tuple[Array, Array, Array]:
    """Amount of each of OVERHEADS in every block: three [N], NumPy arrays or tensors as `share_NK` is.

    share_NK: share of tokens at each level. size_NK: that level's share of the block. occurs: from 0 for a share of no tokens
    to 1 for one of many.
    """
    differ_N = 1 - (1 - occurs(1 - share_NK)).sum(-1)  # no level has all tokens
    further_N = occurs(share_NK).sum(-1) - 1
    at_least_NK = 1 - share_NK.cumsum(-1) + share_NK
    step_NK = size_NK - np.pad(size_NK, ((0, 0), (1, 0)))[:, :-1]
    if not isinstance(share_NK, np.ndarray):
        size_NK, step_NK = (share_NK.new_tensor(values) for values in (size_NK, step_NK))
    return differ_N, further_N, (occurs(at_least_NK) * step_NK - share_NK * size_NK).sum(-1)


@dataclass(frozen=True)
class TokenCost:
    """Cost of a token in a pass where every token has its own levels, averaged over the pass.

        constant + sum_nk share_nk level_nk + sum_ni amount_ni overhead_ni

    levels: constant, and cost of a block whose tokens are all at a level. overhead: by axis, cost of each of OVERHEADS;
    without, it is not counted. tokens: of a pass; a level occurs with the probability that one of so many independent tokens
    has it, so that the cost is the same in every layout.
    """

    levels: Cost
    overhead: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    tokens: int = 1

    def overhead_N3(self, choices: Choices) -> np.ndarray:
        """Cost of each of OVERHEADS in every block."""
        return np.array([self.overhead.get(axis.name, (0.0,) * len(OVERHEADS)) for axis in choices.axes])

    def average(self, choices: Choices, share_NK: np.ndarray) -> float:
        """Cost at these shares, in the unit of `levels`."""
        occurs = lambda share: 1 - (1 - share) ** self.tokens  # noqa: E731
        amount_N3 = np.stack(overheads_N3(share_NK, level_shares_NK(choices), occurs), -1)
        cost = (share_NK * choices.costs_NK(self.levels)).sum() + (amount_N3 * self.overhead_N3(choices)).sum()
        return self.levels.constant + float(cost)

    def by_token(self, choices: Choices, levels_NS: np.ndarray) -> np.ndarray:
        """Cost of each token of a text [S]; their mean is the average cost. All tokens share the overhead equally."""
        one_hot_SNK = np.eye(choices.exists_NK.shape[1])[levels_NS.T]
        alone_S = np.array([self.average(choices, share_NK) for share_NK in one_hot_SNK])
        return alone_S + self.average(choices, one_hot_SNK.mean(0)) - alone_S.mean()


def level_shares_NK(choices: Choices) -> np.ndarray:
    """Each candidate's share of its block."""
    return table([[size / sizes[-1] for size in sizes] for sizes in choices.sizes], 1.0)
