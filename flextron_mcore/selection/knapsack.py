"""Multiple-choice knapsack, exact: one candidate a block, of the least total value, within budgets. No torch import.

Shape suffixes: N blocks, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from flextron_mcore.blocks import Blocks
from flextron_mcore.cost import Cost
from flextron_mcore.space import SubNetwork

Limit = tuple[Cost, float, float]  # a cost, its least and its largest value


def cheapest(blocks: Blocks, values_NK: np.ndarray, limits: Sequence[Limit]) -> SubNetwork | None:
    """The network with the least sum of `values_NK` whose costs are within `limits`; None if there is no such network.

    Solved as an integer program by HiGHS, to optimality.
    """
    exists = np.flatnonzero(blocks.exists_NK)
    count, width = blocks.exists_NK.shape
    one_each = csr_array((np.ones(len(exists)), (exists // width, np.arange(len(exists)))), shape=(count, len(exists)))
    values = values_NK.ravel()[exists]
    values = (values - values.mean()) / (np.abs(values - values.mean()).max() or 1.0)
    slack = 0.0
    while slack < 1e-4:
        constraints = [LinearConstraint(one_each, 1, 1)]
        for cost, least, most in limits:
            # In shares of the full model's cost: bytes and milliseconds alike are of the order of one.
            row = blocks.costs_NK(cost).ravel()[exists] / cost.full
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
        net = blocks.network((exists[found.x.round().astype(bool)] % width).tolist())
        if all(cost.of(net) <= most * (1 + 1e-12) for cost, _, most in limits):
            return net
        slack = slack * 4 or 2e-7  # the solver's tolerance let it exceed a limit by a hair
    return None
