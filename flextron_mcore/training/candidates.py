"""Evaluation of the networks that trained routers may choose: the last word on every budget.

A surrogate is as good as the batches that it learned from, and the best networks of one cost differ by less. So those that the
routers think likeliest are run on the same training samples, all networks of costs that few have, and in some rounds what is
worth trying after these (selection/search.py): on few samples. In a last round the best within reach of each budget are run on
all samples. `selection/router.py` takes the best of these.
"""

from __future__ import annotations

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

_FEW = 40  # networks within WITHIN of a cost, which are all tried
_FEW_IN_ALL = 512
_FIRST = 8  # one sample in so many is enough to tell which are among the best _BEST of those within reach of a budget
_BEST = 3
_ROUNDS = 6
_WORSE = 0.005  # a network whose loss is so much above a cheaper one's, relatively, is no answer to any budget
Evaluate = Callable[[Sequence[SubNetwork], int], Sequence[float]]


def evaluate_candidates(learner: RouterLearner, evaluate: Evaluate, samples: int) -> dict[SubNetwork, float]:
    """{network: loss} of those that matter for budgets of the first cost. Call on all ranks.

    evaluate: losses of networks on the first so many samples, the same for all of them.
    """
    cost, choices, within = learner.costs[0], learner.choices, learner.selector().within
    first = max(samples // _FIRST, 1)
    tried = on_main_process(lambda: list(dict.fromkeys([*learner.selector().proposals(cost), *_few(learner)])))
    losses = dict(zip(tried, evaluate(tried, first), strict=True))
    for _ in range(_ROUNDS):
        near = _best(cost, losses, within, 1)
        more = on_main_process(partial(worth_evaluating, choices, cost, losses, near, within * cost.full))
        losses |= dict(zip(more, evaluate(more, first), strict=True))
    final = _best(cost, losses, within, _BEST)
    return _answers(cost, dict(zip(final, evaluate(final, samples), strict=True)))


def _best(cost: Cost, losses: Mapping[SubNetwork, float], within: float, count: int) -> list[SubNetwork]:
    """The best of those that any budget may get."""
    found: dict[SubNetwork, None] = {}
    budgets = int(np.ceil((cost.full - cost.smallest) / (BIN * cost.full))) + 1
    for high in ((cost.full - i * BIN * cost.full) * (1 + 1e-12) for i in range(budgets)):
        inside = [net for net in losses if high - within * cost.full <= cost.of(net) <= high]
        found |= dict.fromkeys(sorted(inside, key=losses.__getitem__)[:count])
    return list(found)


def _answers(cost: Cost, losses: Mapping[SubNetwork, float]) -> dict[SubNetwork, float]:
    """`losses` without networks that are clearly worse than a cheaper one; the full model stays."""
    kept: dict[SubNetwork, float] = {}
    for net in sorted(losses, key=cost.of):
        if losses[net] <= (1 + _WORSE) * min(kept.values(), default=np.inf) or cost.of(net) >= cost.full * (1 - 1e-12):
            kept[net] = losses[net]
    return kept


def _few(learner: RouterLearner) -> list[SubNetwork]:
    """All networks of costs that few have, near the smallest and the full one: there it is sure that the best is found."""
    choices, cost = learner.choices, learner.costs[0]
    whole = Choices(choices.model, choices.space)
    if choices.uniform:
        networks = Uniform(whole).networks()
        return networks if len(networks) <= _FEW_IN_ALL else []
    found: list[SubNetwork] = []
    high = cost.full
    while high > cost.smallest:
        drawn = draw_near(whole, [Budget(cost, high)], _FEW + 1, seed=0, within=WITHIN)
        found += drawn if len(drawn) <= _FEW else []
        high -= WITHIN * cost.full
    return found
