"""Multiple-choice knapsack, exact: one candidate a block, of the least total value, within budgets. No torch import.

Shape suffixes: N blocks or axes, K candidates, M networks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from flextron_mcore.blocks import Axes, Blocks
from flextron_mcore.cost import Cost
from flextron_mcore.space import SubNetwork

Limit = tuple[Cost, float, float]  # a cost, its least and its largest value


def cheapest(blocks: Blocks | Axes, values_NK: np.ndarray, limits: Sequence[Limit]) -> SubNetwork | None:
    """The network with the least sum of `values_NK` whose costs are within `limits`; None if there is no such network.

    Over blocks solved as an integer program by HiGHS, to optimality; over all axes one such program for every hidden size and
    depth that may hold the best, where a layer that is skipped has no value. There, no value may be below 0.
    """
    if isinstance(blocks, Axes):
        return _uniform(blocks, values_NK, limits) if blocks.uniform else _any(blocks, values_NK, limits)
    return _solve(
        values_NK, blocks.exists_NK, [(blocks.costs_NK(cost), cost, *bounds) for cost, *bounds in limits], blocks.network, limits
    )


def _any(axes: Axes, values_NK: np.ndarray, limits: Sequence[Limit]) -> SubNetwork | None:
    space, best, found = axes.space, np.inf, None
    pairs = itertools.product(range(len(space.hidden_size)), range(len(space.depth)))
    for value, hidden, depth in sorted((values_NK[0, h] + values_NK[1, d], h, d) for h, d in pairs):
        if value >= best:
            break
        kept = np.array(sorted(space.layer_ranking[: space.depth[depth]]))
        rows = 2 + np.stack([2 * kept, 2 * kept + 1], -1).ravel()

        def network(indices: Sequence[int], rows: np.ndarray = rows, hidden: int = hidden, depth: int = depth) -> SubNetwork:
            whole = np.zeros(axes.count, dtype=int)
            whole[[0, 1]], whole[rows] = (hidden, depth), indices
            return axes.network(whole.tolist())

        costs = []
        for cost, *bounds in limits:
            part = cost.at(space.hidden_size[hidden])
            pair = Blocks(axes.model, space).costs_NK(part)[: 2 * len(kept)]  # the same in all layers
            costs.append((pair, part, *bounds))
        net = _solve(values_NK[rows], axes.exists_NK[rows], costs, network, limits)
        if net and (total := axes.total(values_NK, net)) < best:
            best, found = total, net
    return found


def _uniform(axes: Axes, values_NK: np.ndarray, limits: Sequence[Limit]) -> SubNetwork | None:
    indices_MN = np.array(list(itertools.product(*(range(len(sizes)) for sizes in axes.sizes))))
    values_M = np.take_along_axis(values_NK[None], indices_MN[..., None], -1).sum((1, 2))
    for i in values_M.argsort(kind="stable"):
        net = axes.network(indices_MN[i].tolist())
        if all(least <= cost.of(net) <= most * (1 + 1e-12) for cost, least, most in limits):
            return net
    return None


def _solve(
    values_NK: np.ndarray,
    exists_NK: np.ndarray,
    costs: Sequence[tuple[np.ndarray, Cost, float, float]],
    network: Callable[[Sequence[int]], SubNetwork],
    limits: Sequence[Limit],
) -> SubNetwork | None:
    """costs: what candidates add to a cost [N, K], that cost with its constant, its least and its largest value."""
    exists = np.flatnonzero(exists_NK)
    count, width = exists_NK.shape
    one_each = csr_array((np.ones(len(exists)), (exists // width, np.arange(len(exists)))), shape=(count, len(exists)))
    values = values_NK.ravel()[exists]
    values = (values - values.mean()) / (np.abs(values - values.mean()).max() or 1.0)
    slack = 0.0
    while slack < 1e-4:
        constraints = [LinearConstraint(one_each, 1, 1)]
        for costs_NK, cost, least, most in costs:
            # In shares of the full model's cost: bytes and milliseconds alike are of the order of one.
            row = costs_NK.ravel()[exists] / cost.full
            low, high = ((bound - cost.constant) / cost.full for bound in (least, most))
            constraints.append(LinearConstraint(row, low, max(low, high - slack)))
        found = milp(
            values,
            constraints=constraints,
            integrality=np.ones(len(exists)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        net = network((exists[found.x.round().astype(bool)] % width).tolist())
        if all(cost.of(net) <= most * (1 + 1e-12) for cost, _, most in limits):
            return net
        slack = slack * 4 or 2e-7  # the solver's tolerance let it exceed a limit by a hair
    return None
