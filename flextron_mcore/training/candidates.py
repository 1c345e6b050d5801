"""Candidate evaluation: losses of the networks that trained routers may choose, on the same training samples.

Routers alone cannot separate the best networks of one cost: their losses differ by less than the surrogate model's error. So
networks are evaluated on a part of the samples: those that the routers find likeliest, networks of equal widths in all layers,
all networks of costs that few networks have, and for some rounds variations of the best ones (selection/search.py). Then the best
networks of each cost bin (a narrow range of the cost, selection/router.py) are evaluated on all samples, and the selector
`router` chooses among these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from flextron_mcore.choices import Choices
from flextron_mcore.cost import Budget, Cost
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.selection.router import BIN, WITHIN
from flextron_mcore.selection.sampling import draw_near
from flextron_mcore.selection.search import worth_evaluating
from flextron_mcore.selection.selectors import Uniform
from flextron_mcore.space import SubNetwork
from flextron_mcore.training.router import RouterLearner

_RARE = 40  # if no more networks lie within WITHIN of a cost, all of them are evaluated
_UNIFORM = 512  # if the space has no more networks of equal widths in all layers, all of them are evaluated
_FIRST = 8  # the first rounds use 1 / _FIRST of the samples: enough to find the _BEST best networks of a cost bin
_BEST = 3  # networks of each cost bin in the last round
_ROUNDS = 6  # rounds of search
_WORSE = 0.005  # networks with a loss relatively higher by this than a cheaper network's are dropped
Evaluate = Callable[[Sequence[SubNetwork], int], Sequence[float]]


def evaluate_candidates(learner: RouterLearner, evaluate: Evaluate, samples: int) -> dict[SubNetwork, float]:
    """Find good networks for all budgets, and return {network: loss in nats per token}. Call on all ranks.

    The networks that the routers find likeliest, and variations of the best ones, are evaluated on a part of the samples, then
    the best for each budget of the learner's first cost on all samples. Only these are returned, without networks that are
    clearly worse than a cheaper one.

    Args:
        learner: trained routers.
        evaluate: function of (networks, count) that returns the loss of each network on the first `count` samples.
        samples: number of samples of the last round.
    """
    cost, choices, within = learner.costs[0], learner.choices, learner.selector().within
    first = max(samples // _FIRST, 1)
    tried = on_main_process(
        lambda: list(dict.fromkeys([*learner.selector().proposals(cost), *_uniform(choices), *_at_rare_costs(choices, cost)]))
    )
    losses = dict(zip(tried, evaluate(tried, first), strict=True))
    for _ in range(_ROUNDS):
        near = _best(cost, losses, within, 1)
        more = on_main_process(partial(worth_evaluating, choices, cost, losses, near, within * cost.full))
        losses |= dict(zip(more, evaluate(more, first), strict=True))
    final = _best(cost, losses, within, _BEST)
    return _without_worse(cost, dict(zip(final, evaluate(final, samples), strict=True)))


def _best(cost: Cost, losses: Mapping[SubNetwork, float], within: float, count: int) -> list[SubNetwork]:
    """Best networks for each budget of a grid, BIN apart, from the smallest network's cost to the full model's; no duplicates.

    Args:
        cost: cost that budgets limit.
        losses: {network: loss} of the evaluated networks.
        within: share of the full model's cost that a network may leave unused of its budget.
        count: number of networks for a budget, those of least loss.
    """
    found: dict[SubNetwork, None] = {}
    costs = {net: cost.of(net) for net in losses}
    budgets = int(np.ceil((cost.full - cost.smallest) / (BIN * cost.full))) + 1
    for high in ((cost.full - i * BIN * cost.full) * (1 + 1e-12) for i in range(budgets)):
        inside = [net for net, spent in costs.items() if high - within * cost.full <= spent <= high]
        found |= dict.fromkeys(sorted(inside, key=losses.__getitem__)[:count])
    return list(found)


def _without_worse(cost: Cost, losses: Mapping[SubNetwork, float]) -> dict[SubNetwork, float]:
    """Entries of `losses` without networks whose loss is more than 1 + _WORSE times a cheaper one's; the full model stays."""
    kept: dict[SubNetwork, float] = {}
    for net in sorted(losses, key=cost.of):
        if losses[net] <= (1 + _WORSE) * min(kept.values(), default=np.inf) or cost.of(net) >= cost.full * (1 - 1e-12):
            kept[net] = losses[net]
    return kept


def _uniform(choices: Choices) -> list[SubNetwork]:
    """Networks of equal widths in all layers; [] if the space has more than _UNIFORM."""
    count = math.prod(map(len, choices.space.sizes.values()))
    return Uniform(Choices(choices.model, choices.space)).networks() if count <= _UNIFORM else []


def _at_rare_costs(choices: Choices, cost: Cost) -> list[SubNetwork]:
    """All networks of costs that at most _RARE networks have, near the smallest and the full network: none is missed there.

    [] if the routers choose one width for all layers (`Choices.uniform`).
    """
    found: list[SubNetwork] = []
    high = cost.smallest if choices.uniform else cost.full
    while high > cost.smallest:
        drawn = draw_near(Choices(choices.model, choices.space), [Budget(cost, high)], _RARE + 1, seed=0, within=WITHIN)
        found += drawn if len(drawn) <= _RARE else []
        high -= WITHIN * cost.full
    return found
