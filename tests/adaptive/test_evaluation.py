"""What tokens that choose for themselves cost, one by one."""

from __future__ import annotations

import numpy as np
import pytest

from flextron_mcore.adaptive.cost import RoutingCost
from flextron_mcore.adaptive.evaluation import average, each_cost
from tests.routing_toy import family, latency


@pytest.mark.parametrize("mixed", [False, True])
def test_tokens_are_worth_together_what_all_cost(mixed):
    blocks = family()
    cost = latency(blocks)
    if mixed:
        one = 0.01 * cost.full
        overhead = {"heads": (2 * one, one, 3 * one), "ffn_hidden_size": (one, 2 * one, 0.0)}
        cost = RoutingCost.of_levels(cost, cost.candidates, overhead, tokens=64)
    counts = [len(sizes) for sizes in blocks.sizes]
    levels_NS = np.random.default_rng(0).integers(0, np.array(counts)[:, None], (blocks.count, 64))
    shares_NK = np.eye(blocks.exists_NK.shape[1])[levels_NS].mean(1)
    each_S = each_cost(cost, blocks, levels_NS)
    assert each_S.mean() == pytest.approx(average(cost, blocks, shares_NK))
    # Two tokens differ by what their own levels cost.
    plain = blocks.costs_NK(cost)
    own_S = plain[np.arange(blocks.count)[:, None], levels_NS].sum(0)
    assert each_S - each_S[0] == pytest.approx(own_S - own_S[0]) and np.ptp(each_S) > 0
    same = each_cost(cost, blocks, levels_NS[:, :1].repeat(5, 1))
    assert same == pytest.approx(cost.constant + own_S[0])  # all alike: nothing is added
