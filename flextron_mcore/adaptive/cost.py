"""Routing overhead: cost that is added where the tokens of a block differ in their levels. No torch import.

Shape suffixes: N blocks, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flextron_mcore.choices import Choices, table
from flextron_mcore.cost import Cost

# Added to a block's cost: because its tokens differ; for each level beyond the first that occurs; and for the share of the block
# that lies between a token's own level and the highest that occurs (with `kv_policy=full` its keys and values are written).
OVERHEADS = ("differ", "level", "above")


@dataclass(frozen=True)
class RoutingCost(Cost):
    """A cost of blocks whose tokens choose for themselves.

    overhead: {axis: cost of each of OVERHEADS in its block}, in a pass of so many `tokens`.
    """

    overhead: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    tokens: int = 1

    @classmethod
    def of_levels(
        cls, cost: Cost, levels: Mapping[str, tuple[float, ...]], overhead: Mapping[str, tuple[float, ...]], tokens: int
    ) -> RoutingCost:
        """`cost` with other costs of its candidates, which are the tokens' levels."""
        return cls(cost.name, cost.model, cost.space, cost.constant, levels, cost.narrow, overhead, tokens)


def overhead_costs_N3(choices: Choices, cost: Cost) -> np.ndarray:
    """Cost of each of OVERHEADS in every block; zeros for a cost without overhead."""
    overhead = cost.overhead if isinstance(cost, RoutingCost) else {}
    return np.array([overhead.get(axis.name) or (0.0,) * len(OVERHEADS) for axis in choices.axes])


def size_NK(choices: Choices) -> np.ndarray:
    """Each candidate's share of its block."""
    return table([[size / sizes[-1] for size in sizes] for sizes in choices.sizes], 1.0)


def overhead_N3(share_NK: Any, size_NK: np.ndarray, occurs: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
    """Amount of each of OVERHEADS in every block: [N] each. For NumPy arrays and tensors.

    share_NK: the share of tokens at each level. size_NK: the level's share of the block. occurs: how much something occurs that a
    share of the tokens have, 0 for none of them and 1 for many.
    """
    differ_N = 1 - (1 - occurs(1 - share_NK)).sum(-1)  # no level has all tokens
    further_N = occurs(share_NK).sum(-1) - 1
    at_least_NK = 1 - share_NK.cumsum(-1) + share_NK
    step_NK = size_NK - np.pad(size_NK, ((0, 0), (1, 0)))[:, :-1]
    if not isinstance(share_NK, np.ndarray):
        size_NK, step_NK = (share_NK.new_tensor(values) for values in (size_NK, step_NK))
    return differ_N, further_N, (occurs(at_least_NK) * step_NK - share_NK * size_NK).sum(-1)
