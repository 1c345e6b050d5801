"""What the networks that trained routers may choose really lose, measured once: the last word on every budget.

A surrogate is as good as the batches that it learned from; the best networks of one cost differ by less. So those that the
routers think best, and the surrogate, which knows how blocks depend on each other, are run on the same training samples, and all
networks of costs that few have. Two rounds: all of them on few samples, and on all samples the best within reach of each budget.
`selection/routed.py` takes the best of these.

Shape suffixes: N blocks, K candidates, M moves, each of one block to another candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from flextron_mcore.blocks import Axes, Blocks
from flextron_mcore.cost import Budget
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.selection.routed import CELL, WITHIN
from flextron_mcore.selection.sampling import draw_near
from flextron_mcore.selection.selectors import Uniform
from flextron_mcore.space import SubNetwork
from flextron_mcore.training.router import RouterLearner

_MORE = 3  # networks that are tried beside each cell's likeliest
_FEW = 40  # networks within WITHIN of a cost, which are all tried
_FEW_IN_ALL = 512
_FIRST = 8  # one sample in so many is enough to tell which are among the best _BEST of those within reach of a budget
_BEST = 3
Measure = Callable[[Sequence[SubNetwork], int], Sequence[float]]


def measured(learner: RouterLearner, measure: Measure, samples: int) -> dict[SubNetwork, float]:
    """{network: loss} of those that matter for budgets of the first cost. Call on all ranks.

    measure: losses of networks on the first so many samples, the same for all of them.
    """
    cost = learner.costs[0]
    tried = on_main_process(lambda: _candidates(learner))
    losses = dict(zip(tried, measure(tried, max(samples // _FIRST, 1)), strict=True))
    final: dict[SubNetwork, None] = {}
    count = int(np.ceil((cost.full - cost.smallest) / (CELL * cost.full)))
    unused = learner.selector().within * cost.full
    for high in ((cost.full - i * CELL * cost.full) * (1 + 1e-12) for i in range(count + 1)):
        inside = [net for net in tried if high - unused <= cost.of(net) <= high]
        final |= dict.fromkeys(sorted(inside, key=losses.__getitem__)[:_BEST])
    return dict(zip(final, measure(list(final), samples), strict=True))


def _candidates(learner: RouterLearner) -> list[SubNetwork]:
    proposals = learner.selector().proposals(learner.costs[0])
    near = (net for likeliest in proposals for net in (likeliest, *_neighbours(learner, likeliest)))
    return list(dict.fromkeys([*near, *_few(learner)]))


def _few(learner: RouterLearner) -> list[SubNetwork]:
    """All networks of costs that few have, near the smallest and the full one: there it is sure that the best is found."""
    blocks, cost = learner.blocks, learner.costs[0]
    whole = Blocks(blocks.model, blocks.space)
    if isinstance(blocks, Axes) and blocks.uniform:
        networks = Uniform(whole).networks()
        return networks if len(networks) <= _FEW_IN_ALL else []
    found: list[SubNetwork] = []
    high = cost.full
    while high > cost.smallest:
        drawn = draw_near(whole, [Budget(cost, high)], _FEW + 1, seed=0, within=WITHIN)
        found += drawn if len(drawn) <= _FEW else []
        high -= WITHIN * cost.full
    return found


@torch.no_grad()
def _neighbours(learner: RouterLearner, net: SubNetwork) -> list[SubNetwork]:
    """Those that the surrogate thinks best of the networks that differ in two blocks at most and cost as much, but for WITHIN."""
    if learner.surrogate is None:
        return []
    blocks, cost = learner.blocks, learner.costs[0]
    costs_NK, exists_NK = blocks.costs_NK(cost), blocks.exists_NK
    own_N = np.array(blocks.indices(net))
    step_NK = costs_NK - np.take_along_axis(costs_NK, own_N[:, None], 1)
    others_NK = exists_NK & (np.arange(exists_NK.shape[1]) != own_N[:, None])
    block_M, candidate_M = np.argwhere(others_NK).T
    i, j = np.triu_indices(len(block_M))  # where i = j, one move alone
    spent = step_NK[block_M[i], candidate_M[i]] + np.where(i == j, 0.0, step_NK[block_M[j], candidate_M[j]])
    near = ((block_M[i] != block_M[j]) | (i == j)) & (spent <= 0) & (spent >= -WITHIN * cost.full)
    if not near.any():
        return []
    rows = np.repeat(own_N[None], near.sum(), 0)
    for move in (i[near], j[near]):
        rows[np.arange(len(rows)), block_M[move]] = candidate_M[move]
    losses = learner.surrogate(torch.nn.functional.one_hot(torch.from_numpy(rows), exists_NK.shape[1]).float())
    return [blocks.network(rows[i].tolist()) for i in losses.argsort()[:_MORE].tolist()]
