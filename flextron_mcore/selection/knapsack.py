"""Multiple-choice knapsack, exact: one candidate a block, of the least total value, within budgets. No torch import.

Shape suffixes: N blocks or axes, K candidates, M networks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from flextron_mcore.blocks import Axes, Blocks
from flextron_mcore.cost import Cost
from flextron_mcore.space import SubNetwork

Limit = tuple[Cost, float, float]  # a cost, its least and its largest value


def cheapest(blocks: Blocks | Axes, values_NK: np.ndarray, limits: Sequence[Limit]) -> SubNetwork | None:
    """The network with the least sum of `values_NK` whose costs are within `limits`; None if there is no such network.

    Solved as an integer program by HiGHS, to optimality; over all axes one for every hidden size and depth that may hold the
    best. There, a layer that is skipped has no value, and no value may be below 0.
    """
    if isinstance(blocks, Axes):
        return _any(blocks, values_NK, limits)
    return _solve(
        values_NK, blocks.exists_NK, [(blocks.costs_NK(cost), cost, *bounds) for cost, *bounds in limits], blocks.network, limits
    )


def every_size(axes: Axes, values_NK: np.ndarray, limits: Sequence[Limit]) -> list[SubNetwork]:
    """As `cheapest`, but of every hidden size and depth with a network within the limits."""
    found = [_of_size(axes, values_NK, limits, hidden, depth) for hidden, depth in _sizes(axes)]
    return [net for net in found if net]


def _sizes(axes: Axes) -> list[tuple[int, int]]:
    return list(itertools.product(range(len(axes.space.hidden_size)), range(len(axes.space.depth))))


def _any(axes: Axes, values_NK: np.ndarray, limits: Sequence[Limit]) -> SubNetwork | None:
    best, found = np.inf, None
    for value, hidden, depth in sorted((values_NK[0, h] + values_NK[1, d], h, d) for h, d in _sizes(axes)):
        if value >= best:
            break
        net = _of_size(axes, values_NK, limits, hidden, depth)
        if net and (total := axes.total(values_NK, net)) < best:
            best, found = total, net
    return found


def _of_size(axes: Axes, values_NK: np.ndarray, limits: Sequence[Limit], hidden: int, depth: int) -> SubNetwork | None:
    """The best network of the given candidates of hidden size and depth."""
    space = axes.space
    if axes.uniform:
        pairs = itertools.product(range(len(space.heads)), range(len(space.ffn_hidden_size)))
        networks = [axes.network([hidden, depth, *pair]) for pair in pairs]
        fitting = [net for net in networks if all(low <= cost.of(net) <= high * (1 + 1e-12) for cost, low, high in limits)]
        return min(fitting, key=lambda net: axes.total(values_NK, net), default=None)
    kept = np.array(sorted(space.layer_ranking[: space.depth[depth]]))
    rows = 2 + np.stack([2 * kept, 2 * kept + 1], -1).ravel()

    def network(indices: Sequence[int]) -> SubNetwork:
        whole = np.zeros(axes.count, dtype=int)
        whole[[0, 1]], whole[rows] = (hidden, depth), indices
        return axes.network(whole.tolist())

    blocks, count = Blocks(axes.model, space), len(rows)  # of which the first are like the rest
    parts = [(cost.at(space.hidden_size[hidden]), *bounds) for cost, *bounds in limits]
    if not all(cost.reaches(len(kept), *bounds) for cost, *bounds in parts):
        return None
    costs = [(blocks.costs_NK(cost)[:count], cost, *bounds) for cost, *bounds in parts]
    exists_NK = blocks.exists_NK[:count]
    return _solve(values_NK[rows, : exists_NK.shape[1]], exists_NK, costs, network, limits)


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
        with _quiet():
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS prints lines of its own to the terminal, from C."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
