"""Random sub-networks of a given cost. No torch import.

Shape suffixes: N blocks, K candidates, M draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from flextron_mcore.blocks import Blocks
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget, Cost
from flextron_mcore.space import SubNetwork

_DRAWS, _IDLE_ROUNDS = 4096, 5


def draw_near(blocks: Blocks, budgets: Sequence[Budget], count: int, seed: int, within: float = 0.01) -> list[SubNetwork]:
    """Up to `count` different random networks that keep to all `budgets`, and use the first but for `within` of the full cost.

    Where hidden size or depth are elastic, as many of each combination of them as there are. Of one of these all networks
    within the bounds are about equally likely: blocks are drawn with probabilities that fall or rise
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
    generator = np.random.default_rng(np.random.SeedSequence([seed, 5]))
    every = itertools.product(blocks.space.hidden_size, blocks.space.depth)
    near = [(hidden, depth) for hidden, depth in every if first.cost.at(hidden).reaches(depth, least, first.limit)]
    sizes = [_Size(blocks, first.cost, hidden, depth) for hidden, depth in near]
    found: dict[SubNetwork, None] = {}
    idle = 0  # rounds without a new one
    while sizes and idle < _IDLE_ROUNDS:
        before = len(found)
        for size in sizes:
            drawn = [net for net in size.draw(least, first.limit, generator) if all(budget.allows(net) for budget in budgets)]
            new = [net for net in drawn if net not in found]
            for net in new[: -(-(count - before) // len(sizes))]:
                found[net] = None
                if len(found) == count:
                    return list(found)
        idle = 0 if len(found) > before else idle + 1
    return list(found)


class _Size:
    """Networks of one hidden size and depth."""

    def __init__(self, blocks: Blocks, cost: Cost, hidden_size: int, depth: int) -> None:
        self.blocks, self.hidden_size, self.depth, self.cost = blocks, hidden_size, depth, cost.at(hidden_size)
        self.rows = 2 * depth  # the same in all layers
        self.costs_NK, self.exists_NK = (table[: self.rows] for table in (blocks.costs_NK(self.cost), blocks.exists_NK))

    def draw(self, least: float, most: float, generator: np.random.Generator) -> list[SubNetwork]:
        """Those of a round of draws that cost between `least` and `most`."""
        p_NK = _tilted(self.costs_NK, self.exists_NK, (least + most) / 2 - self.cost.constant)
        u_MN = generator.random((_DRAWS, self.rows))
        indices_MN = (u_MN[..., None] > p_NK.cumsum(-1)[:, :-1]).sum(-1)
        cost_M = self.cost.constant + np.take_along_axis(self.costs_NK[None], indices_MN[..., None], -1).sum((1, 2))
        fitting = indices_MN[(cost_M >= least) & (cost_M <= most * (1 + 1e-12))]
        _, firsts = np.unique(fitting, axis=0, return_index=True)
        return [self._network(fitting[row].tolist()) for row in np.sort(firsts)]

    def _network(self, indices: Sequence[int]) -> SubNetwork:
        space = self.blocks.space
        whole = [0] * self.blocks.count
        for place, layer in enumerate(sorted(space.layer_ranking[: self.depth])):
            whole[2 * layer : 2 * layer + 2] = indices[2 * place : 2 * place + 2]
        choices = self.blocks.network(whole).layers
        return space.network(self.blocks.model, choices, self.hidden_size, self.depth)


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
