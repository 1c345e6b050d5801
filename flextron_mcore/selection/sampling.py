"""Random sub-networks of a given cost. No torch import.

Shape suffixes: N blocks, K candidates, M draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flextron_mcore.blocks import Blocks
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget
from flextron_mcore.space import SubNetwork

_DRAWS, _IDLE_ROUNDS = 4096, 5


def draw_near(blocks: Blocks, budgets: Sequence[Budget], count: int, seed: int, within: float = 0.01) -> list[SubNetwork]:
    """Up to `count` different random networks that keep to all `budgets`, and use the first but for `within` of the full cost.

    All networks within these bounds are about equally likely: blocks are drawn with probabilities that fall or rise
    exponentially with cost, so that the mean is as wanted, and two networks of the same cost have the same probability
    whatever that exponent. Fewer come back where few exist; where none does, the bound is widened. Raises FlextronError where
    the budgets hold no network that can be found.
    """
    while within <= 1:
        if found := _draw(blocks, budgets, count, seed, within):
            return found
        within *= 2
    raise FlextronError(f"no random network found that keeps to {' and '.join(map(str, budgets))}")


def _draw(blocks: Blocks, budgets: Sequence[Budget], count: int, seed: int, within: float) -> list[SubNetwork]:
    first = budgets[0]
    least = first.limit - within * first.cost.full
    costs_NK = blocks.costs_NK(first.cost)
    p_NK = _tilted(costs_NK, blocks.exists_NK, (least + first.limit) / 2 - first.cost.constant)
    edges_NK = p_NK.cumsum(-1)
    generator = np.random.default_rng(np.random.SeedSequence([seed, 5]))
    found: dict[SubNetwork, None] = {}
    idle = 0  # rounds without a new one
    while idle < _IDLE_ROUNDS:
        before = len(found)
        u_MN = generator.random((_DRAWS, blocks.count))
        indices_MN = (u_MN[..., None] > edges_NK[:, :-1]).sum(-1)
        cost_M = first.cost.constant + np.take_along_axis(costs_NK[None], indices_MN[..., None], -1).sum((1, 2))
        fitting = indices_MN[(cost_M >= least) & (cost_M <= first.limit * (1 + 1e-12))]
        _, firsts = np.unique(fitting, axis=0, return_index=True)
        for row in np.sort(firsts):
            net = blocks.network(fitting[row].tolist())
            if net not in found and all(budget.allows(net) for budget in budgets):
                found[net] = None
                if len(found) == count:
                    return list(found)
        idle = 0 if len(found) > before else idle + 1
    return list(found)


def _tilted(costs_NK: np.ndarray, exists_NK: np.ndarray, wanted: float) -> np.ndarray:
    """Probabilities in proportion to exp(b cost), with the b that makes the expected sum `wanted`."""
    scale = costs_NK.max() or 1.0

    def probabilities(b: float) -> np.ndarray:
        logits_NK = np.where(exists_NK, b * costs_NK / scale, -np.inf)
        weights_NK = np.exp(logits_NK - logits_NK.max(-1, keepdims=True))
        return weights_NK / weights_NK.sum(-1, keepdims=True)

    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        if (probabilities(middle) * costs_NK).sum() < wanted:
            low = middle
        else:
            high = middle
    return probabilities(low)
