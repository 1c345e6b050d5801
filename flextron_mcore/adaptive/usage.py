"""Cost of a forward pass from the share of tokens at each level of each block. No torch import.

If all tokens have the same levels, the pass is a sub-network. Tokens of different levels add a routing overhead, because every
level that occurs is a matrix product of its own (layers/tokens/).

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

# Terms of a block's routing overhead. differ: tokens have different levels. level: number of levels that occur, less one. above:
# share of the block between a token's level and the highest that occurs, averaged over tokens: with kv_policy=full their keys and
# values are computed.
OVERHEADS = ("differ", "level", "above")


def overheads_N3(share_NK: Array, size_NK: np.ndarray, occurs: Callable[[Array], Array]) -> tuple[Array, Array, Array]:
    """Amount [N] of each of the three kinds of routing overhead (OVERHEADS) in every block, as arrays or tensors like `share_NK`.

    Routing overhead is cost that tokens of different levels add. A level is the index of a block's candidate, 0 the smallest.

    Args:
        share_NK: share of tokens at each level.
        size_NK: size of each level, as a share of the full block.
        occurs: function from a share of tokens to the probability that at least one token of a pass is in that share.
    """
    differ_N = 1 - (1 - occurs(1 - share_NK)).sum(-1)  # 1 - the probability that one level has all tokens
    further_N = occurs(share_NK).sum(-1) - 1
    at_least_NK = 1 - share_NK.cumsum(-1) + share_NK
    step_NK = size_NK - np.pad(size_NK, ((0, 0), (1, 0)))[:, :-1]
    if not isinstance(share_NK, np.ndarray):
        size_NK, step_NK = (share_NK.new_tensor(values) for values in (size_NK, step_NK))
    return differ_N, further_N, (occurs(at_least_NK) * step_NK - share_NK * size_NK).sum(-1)


@dataclass(frozen=True)
class TokenCost:
    """Cost of a pass in which every token has its own level (index of the candidate) in each block n.

        constant + sum_nk share_nk * level_nk + sum_ni amount_ni * overhead_ni

    share_nk is the share of tokens at level k; amount_ni the amount of routing overhead of kind i (`overheads_N3`).

    Attributes:
        levels: constant, and level_nk: cost of block n if all tokens are at level k.
        overhead: {axis: overhead_ni of the axis's blocks, the cost of each kind of routing overhead i (OVERHEADS)}; empty if
            routing overhead is not counted.
        tokens: number of tokens of a pass, taken as independent. It gives the probability that a level occurs, which does not
            depend on the layout over ranks.
    """

    levels: Cost
    overhead: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    tokens: int = 1

    def overhead_N3(self, choices: Choices) -> np.ndarray:
        """Cost [N, 3] of one unit of each kind of routing overhead (OVERHEADS) in every block."""
        return np.array([self.overhead.get(axis.name, (0.0,) * len(OVERHEADS)) for axis in choices.axes])

    def average(self, choices: Choices, share_NK: np.ndarray) -> float:
        """Cost of a pass with some shares of tokens at each level, in the unit of `levels`.

        share_NK: share of tokens at each level k (index of the candidate) of each block n.
        """
        occurs = lambda share: 1 - (1 - share) ** self.tokens  # noqa: E731
        amount_N3 = np.stack(overheads_N3(share_NK, level_shares_NK(choices), occurs), -1)
        cost = (share_NK * choices.costs_NK(self.levels)).sum() + (amount_N3 * self.overhead_N3(choices)).sum()
        return self.levels.constant + float(cost)

    def by_token(self, choices: Choices, levels_NS: np.ndarray) -> np.ndarray:
        """Cost [S] attributed to each token of a text, in the unit of `levels`; the mean over tokens is the cost of the pass.

        All tokens share the routing overhead equally. levels_NS: level (index of the candidate) of each token in each block.
        """
        one_hot_SNK = np.eye(choices.exists_NK.shape[1])[levels_NS.T]
        alone_S = np.array([self.average(choices, share_NK) for share_NK in one_hot_SNK])
        return alone_S + self.average(choices, one_hot_SNK.mean(0)) - alone_S.mean()


def level_shares_NK(choices: Choices) -> np.ndarray:
    """Size of each candidate of each block as a share of its axis's full size [N, K]; 1 for candidates that a block lacks."""
    return table([[size / sizes[-1] for size in sizes] for sizes in choices.sizes], 1.0)
