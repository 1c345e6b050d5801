"""Cost of a forward pass in which tokens have levels of their own: the average, and each token's share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flextron_mcore.adaptive.usage import TokenCost
from flextron_mcore.space import SubNetwork
from tests import toy
from tests.routing_toy import family, latency


def test_the_average_cost_of_a_pure_mix_is_the_networks():
    choices = family(2)
    cost = latency(choices)
    tokens = TokenCost(cost)
    net = toy.random_network(choices.model, choices.space, 3)
    pure = np.eye(4)[choices.indices(net)]
    assert tokens.average(choices, pure) == pytest.approx(cost.of(net))
    full = np.eye(4)[choices.indices(SubNetwork.full(choices.model))]
    assert tokens.average(choices, (pure + full) / 2) == pytest.approx((cost.of(net) + cost.full) / 2)


@pytest.mark.parametrize(
    "which, added",
    [  # terms of both layers' attention and MLP; the comments have the tokens' shares
        (0, 3 * 1 + 5 * 1 + 3 * 0 + 5 * (1 - 0.999**1000)),
        (1, 3 * 1 + 5 * 3 + 3 * 0 + 5 * (1 - 0.999**1000)),
        (2, 3 * 0.125 + 5 * 0.375 + 3 * 0 + 5 * (0.25 + (1 - 0.999**1000) * 0.75 - (0.999 * 0.25 + 0.001))),
    ],
)
def test_tokens_that_differ_have_an_overhead(which, added):
    """Overhead grows with differing tokens, with each further level, and with the part above a token's own level."""
    choices = family(2)  # candidates are 1/4, 1/2, 3/4 and all
    cost = TokenCost(latency(choices))
    overhead = {axis: tuple(value * (i == which) for i in range(3)) for axis, value in (("heads", 3.0), ("ffn_hidden_size", 5.0))}
    differing = replace(cost, overhead=overhead, tokens=1000)
    pure, share_NK = np.eye(4)[[0, 1, 2, 3]], np.array([[0.5, 0.5, 0, 0], [0.25] * 4, [0, 0, 0, 1], [0.999, 0, 0, 0.001]])
    assert differing.average(choices, pure) == pytest.approx(cost.average(choices, pure))
    assert differing.average(choices, share_NK) - cost.average(choices, share_NK) == pytest.approx(added, rel=1e-6)
    alone = replace(differing, tokens=1)  # a single token has one level, so there is no overhead
    assert alone.average(choices, share_NK) == pytest.approx(cost.average(choices, share_NK))


@pytest.mark.parametrize("differ", [False, True])
def test_costs_of_tokens_have_the_mean_of_all(differ):
    choices = family()
    levels = latency(choices)
    cost = TokenCost(levels)
    if differ:
        one = 0.01 * levels.full
        overhead = {"heads": (2 * one, one, 3 * one), "ffn_hidden_size": (one, 2 * one, 0.0)}
        cost = TokenCost(levels, overhead, 64)
    counts = [len(sizes) for sizes in choices.sizes]
    levels_NS = np.random.default_rng(0).integers(0, np.array(counts)[:, None], (choices.count, 64))
    shares_NK = np.eye(choices.exists_NK.shape[1])[levels_NS].mean(1)
    each_S = cost.by_token(choices, levels_NS)
    assert each_S.mean() == pytest.approx(cost.average(choices, shares_NK))
    # Costs of two tokens differ by the costs of their levels: the overhead is shared.
    plain = choices.costs_NK(levels)
    own_S = plain[np.arange(choices.count)[:, None], levels_NS].sum(0)
    assert each_S - each_S[0] == pytest.approx(own_S - own_S[0]) and np.ptp(each_S) > 0
    same = cost.by_token(choices, levels_NS[:, :1].repeat(5, 1))
    assert same == pytest.approx(levels.constant + own_S[0])  # no overhead
