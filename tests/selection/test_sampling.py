"""Random networks of a given cost."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget, Cost, memory_cost
from flextron_mcore.selection.sampling import draw_near
from tests.routing_toy import family, latency


def test_random_networks_keep_to_the_budget_and_use_it():
    choices = family(12)
    cost = latency(choices)
    for share in np.linspace(cost.smallest / cost.full + 0.02, 0.97, 9):
        drawn = draw_near(choices, [Budget(cost, share * cost.full)], 50, seed=3)
        assert len(set(drawn)) == 50
        assert all(share - 0.01 <= cost.of(net) / cost.full <= share + 1e-9 for net in drawn)
        assert drawn == draw_near(choices, [Budget(cost, share * cost.full)], 50, seed=3)
        assert drawn != draw_near(choices, [Budget(cost, share * cost.full)], 50, seed=4)


def test_every_network_of_that_cost_is_as_likely():
    """Networks near one cost are equally likely: chi-square test over a small space."""
    choices = family(2)
    cost = latency(choices)
    budget = [Budget(cost, 0.9 * cost.full)]
    every = [choices.network(indices) for indices in itertools.product(*(range(len(sizes)) for sizes in choices.sizes))]
    near = [net for net in every if 0.85 * cost.full <= cost.of(net) <= 0.9 * cost.full]
    counts = Counter(net for seed in range(2000) for net in draw_near(choices, budget, 1, seed, within=0.05))
    assert counts.keys() == set(near) and len(near) > 5
    expected = 2000 / len(near)
    assert sum((counts[net] - expected) ** 2 / expected for net in near) < len(near) + 5 * (2 * len(near)) ** 0.5


def test_the_cheapest_network_where_a_table_has_an_outlier():
    """The cheapest network is found although one candidate takes 900 ms, beside which 1.000 and 1.001 ms are nearly equal."""
    choices = family(12)
    candidates = {"heads": (900.0, 1.0, 1.001, 1.002), "ffn_hidden_size": (1.002, 1.001, 1.0, 1.003)}
    cost = Cost("latency", choices.model, choices.space, 5.0, candidates)
    (cheapest,) = draw_near(choices, [Budget(cost, cost.smallest + 1e-6)], 10, seed=0)
    assert cost.of(cheapest) == pytest.approx(cost.smallest, rel=1e-12) and choices.indices(cheapest) == [1, 2] * 12


def test_budgets_with_few_networks():
    choices = family(2, heads=[1.0], ffn_hidden_size=[0.5, 1.0])
    cost = latency(choices)
    assert draw_near(choices, [Budget(cost, cost.full)], 10, 0) == [choices.network([0, 1, 0, 1])]
    between = [Budget(cost, 0.999 * cost.full)]  # no network within 1 % below the budget: the bound is widened
    assert set(draw_near(choices, between, 10, 0)) == {choices.network([0, 0, 0, 1]), choices.network([0, 1, 0, 0])}
    memory = memory_cost(choices.model, choices.space, "fp32", 1, 8)
    assert draw_near(choices, [Budget(cost, cost.full), Budget(memory, memory.smallest)], 10, 0) == [
        choices.network([0, 0, 0, 0])
    ]
    with pytest.raises(FlextronError, match="no random network found that keeps to latency <= .* and parameters"):
        from flextron_mcore.cost import parameter_cost

        parameters = parameter_cost(choices.model, choices.space)
        draw_near(choices, [Budget(cost, cost.full), Budget(parameters, parameters.smallest - 1)], 10, 0)
