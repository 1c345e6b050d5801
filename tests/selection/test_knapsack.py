"""The knapsack solver is exact: compared with all networks of a small space."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flextron_mcore.choices import Choices
from flextron_mcore.cost import memory_cost, parameter_cost
from flextron_mcore.selection.knapsack import cheapest
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.routing_toy import family, latency

BLOCKS = family(2, ffn_hidden_size=[0.25, 0.5, 1.0])
EVERY = [BLOCKS.network(indices) for indices in itertools.product(*(range(len(sizes)) for sizes in BLOCKS.sizes))]
LATENCY = latency(BLOCKS)
MEMORY = memory_cost(BLOCKS.model, BLOCKS.space, "bf16", 64, 24)


def values_of(values_NK: np.ndarray, net) -> float:
    return sum(values_NK[block, k] for block, k in enumerate(BLOCKS.indices(net)))


@pytest.mark.parametrize("seed", range(5))
def test_against_all_networks(seed):
    generator = np.random.default_rng(seed)
    values_NK = generator.normal(size=BLOCKS.exists_NK.shape) * 10.0 ** generator.integers(-6, 6)
    for share in generator.uniform(LATENCY.smallest / LATENCY.full, 1, 6):
        for limits in (
            [(LATENCY, 0.0, share * LATENCY.full)],
            [(LATENCY, (share - 0.05) * LATENCY.full, share * LATENCY.full)],
            [(LATENCY, 0.0, share * LATENCY.full), (MEMORY, 0.0, 0.8 * MEMORY.full)],
        ):
            allowed = [net for net in EVERY if all(low <= cost.of(net) <= high for cost, low, high in limits)]
            found = cheapest(BLOCKS, values_NK, limits)
            if not allowed:
                assert found is None
                continue
            best = min(values_of(values_NK, net) for net in allowed)
            assert found in allowed and values_of(values_NK, found) == pytest.approx(best, rel=1e-9)


def test_a_limit_that_is_just_met_and_one_that_is_just_not():
    """A limit equal to a network's cost admits the network. A limit 0.001 lower, which the solver's tolerance hides, does not."""
    parameters = parameter_cost(BLOCKS.model, BLOCKS.space)
    values_NK = -BLOCKS.costs_NK(parameters)
    for net in EVERY[::7]:
        value = parameters.of(net)
        assert parameters.of(cheapest(BLOCKS, values_NK, [(parameters, 0.0, value)])) == value
        below = [cost for cost in map(parameters.of, EVERY) if cost <= value - 1e-3]
        found = cheapest(BLOCKS, values_NK, [(parameters, 0.0, value - 1e-3)])
        assert (found and parameters.of(found)) == (max(below) if below else None)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_over_all_axes_against_all_networks(seed, uniform):
    arch = toy.config(num_layers=3)
    space = ElasticSpace.build(
        arch, heads=[0.5, 1.0], ffn_hidden_size=[0.5, 1.0], hidden_size=[8, 32], depth=[1, 2, 3], layer_ranking=[2, 0, 1]
    )
    axes, generator = Choices(arch, space, all_axes=True, uniform=uniform), np.random.default_rng(seed)
    every = {axes.network(indices) for indices in itertools.product(*(range(len(sizes)) for sizes in axes.sizes))}
    costs = parameter_cost(arch, space), memory_cost(arch, space, "bf16", 64, 24)
    values_NK = generator.exponential(size=axes.exists_NK.shape) * 10.0 ** generator.integers(-3, 3)
    for share in generator.uniform(costs[0].smallest / costs[0].full, 1, 6):
        for limits in (
            [(costs[0], 0.0, share * costs[0].full)],
            [(costs[0], (share - 0.05) * costs[0].full, share * costs[0].full)],
            [(costs[0], 0.0, share * costs[0].full), (costs[1], 0.0, 0.7 * costs[1].full)],
        ):
            allowed = [net for net in every if all(low <= cost.of(net) <= high for cost, low, high in limits)]
            found = cheapest(axes, values_NK, limits)
            if not allowed:
                assert found is None
                continue
            best = min(axes.total(values_NK, net) for net in allowed)
            assert found in allowed and axes.total(values_NK, found) == pytest.approx(best, rel=1e-9)
