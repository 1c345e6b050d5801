"""Random sub-networks of a given cost. No torch import.

Shape suffixes: N blocks, K candidates, M draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget, Cost
from flextron_mcore.space import SubNetwork

_DRAWS, _IDLE_ROUNDS = 4096, 5  # draws of a round, and rounds without a new network after which drawing ends


def draw_near(choices: Choices, budgets: Sequence[Budget], count: int, seed: int, within: float = 0.01) -> list[SubNetwork]:
    """Draw different random networks within all budgets that use nearly all of the first budget.

    Candidates are drawn with probabilities exp(b * cost), with b such that the mean cost is as wanted. Two networks of the same
    cost then have the same probability, so networks of one hidden size and depth are drawn about uniformly. Combinations of
    elastic hidden size and depth get equal numbers of networks. Raises FlextronError if no network is found, the cheapest one
    included.

    Args:
        choices: choices of the layers (without `all_axes`).
        budgets: budgets, all to be met.
        count: largest number of networks; fewer are returned if some rounds of draws find no new one.
        seed: seed of the draws.
        within: share of the full model's cost by which a network may stay below the first budget; doubled while none is found.
            If none is found even at 1, the cheapest network is the only one returned.
    """
    while within <= 1:
        if found := _draw(choices, budgets, count, seed, within):
            return found
        within *= 2
    # Probabilities depend on a candidate's cost relative to the largest one: beside an outlier of a measured table, all other
    # candidates are about equally likely, so that a small budget may never be met.
    cheapest = Choices(choices.model, choices.space, all_axes=True).least(budgets[0].cost)
    if all(budget.allows(cheapest) for budget in budgets):
        return [cheapest]
    raise FlextronError(f"no random network found that keeps to {' and '.join(map(str, budgets))}: raise one of the budgets")


def _draw(choices: Choices, budgets: Sequence[Budget], count: int, seed: int, within: float) -> list[SubNetwork]:
    """Different random networks within all budgets, near the first budget; [] if none is found.

    Args:
        choices: choices of the layers.
        budgets: budgets, all to be met.
        count: largest number of networks.
        seed: seed of the draws.
        within: share of the full model's cost by which a network may stay below the first budget.
    """
    first = budgets[0]
    least = first.limit - within * first.cost.full
    generator = np.random.default_rng(np.random.SeedSequence([seed, 5]))
    every = itertools.product(choices.space.hidden_size, choices.space.depth)
    near = [(hidden, depth) for hidden, depth in every if first.cost.at(hidden).reaches(depth, least, first.limit)]
    sizes = [_Size(choices, first.cost, hidden, depth) for hidden, depth in near]
    found: dict[SubNetwork, None] = {}
    idle = 0  # consecutive rounds without a new network
    while sizes and idle < _IDLE_ROUNDS:
        before = len(found)
        for size in sizes:
            drawn = (net for net in size.draw(least, first.limit, generator) if all(budget.allows(net) for budget in budgets))
            new = (net for net in drawn if net not in found)
            for net in itertools.islice(new, -(-(count - before) // len(sizes))):
                found[net] = None
                if len(found) == count:
                    return list(found)
        idle = 0 if len(found) > before else idle + 1
    return list(found)


class _Size:
    """Random networks of one hidden size and depth.

    Args:
        choices: choices of the layers.
        cost: cost that draws aim at.
        hidden_size: hidden size of the networks.
        depth: number of executed layers.
    """

    def __init__(self, choices: Choices, cost: Cost, hidden_size: int, depth: int) -> None:
        self.choices, self.hidden_size, self.depth, self.cost = choices, hidden_size, depth, cost.at(hidden_size)
        self.rows = choices.rows(sorted(choices.space.layer_ranking[:depth]))
        self.costs_NK, self.exists_NK = choices.costs_NK(self.cost)[self.rows], choices.exists_NK[self.rows]

    def draw(self, least: float, most: float, generator: np.random.Generator) -> Iterator[SubNetwork]:
        """Draw _DRAWS networks, and iterate over the different ones that cost between `least` and `most`, in the cost's unit.

        Each network is made only when it is asked for: most callers want few.
        """
        p_NK = _exponential_probabilities(self.costs_NK, self.exists_NK, (least + most) / 2 - self.cost.constant)
        u_MN = generator.random((_DRAWS, len(self.rows)))
        indices_MN = (u_MN[..., None] > p_NK.cumsum(-1)[:, :-1]).sum(-1)
        cost_M = self.cost.constant + np.take_along_axis(self.costs_NK[None], indices_MN[..., None], -1).sum((1, 2))
        fitting = indices_MN[(cost_M >= least) & (cost_M <= most * (1 + 1e-12))]
        _, firsts = np.unique(fitting, axis=0, return_index=True)
        return (self._network(fitting[row].tolist()) for row in np.sort(firsts))

    def _network(self, indices: Sequence[int]) -> SubNetwork:
        """Network with these candidate indices in its executed layers."""
        choices, whole = self.choices, np.zeros(self.choices.count, dtype=int)
        whole[self.rows] = indices
        layers = choices.network(whole.tolist()).layers
        return choices.space.network(choices.model, layers, self.hidden_size, self.depth)


def _exponential_probabilities(costs_NK: np.ndarray, exists_NK: np.ndarray, wanted: float) -> np.ndarray:
    """Probabilities [N, K] proportional to exp(b * cost), with b such that the expected total cost is `wanted`.

    Args:
        costs_NK: cost of each candidate k of each block n.
        exists_NK: True for candidates that exist.
        wanted: sum over blocks of the expected costs.
    """
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
