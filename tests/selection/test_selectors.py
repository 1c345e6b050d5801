"""Selectors that need no training: uniform, matformer, random, sensitivity."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget, memory_cost, parameter_cost
from flextron_mcore.selection.selectors import MatFormer, Random, Sensitivity, Uniform
from flextron_mcore.space import SubNetwork, count_parameters
from tests.routing_toy import family, latency, true_loss

BLOCKS = family(2)
COST = latency(BLOCKS)
LOSS = true_loss(BLOCKS)
EVERY = [BLOCKS.network(indices) for indices in itertools.product(*(range(len(sizes)) for sizes in BLOCKS.sizes))]


def budget(share: float) -> list[Budget]:
    return [Budget(COST, share * COST.full)]


def test_uniform_and_matformer_take_the_largest_that_fits():
    for share in (0.75, 0.8, 0.9, 1.0):
        fitting = [net for net in EVERY if net.is_uniform and COST.of(net) <= share * COST.full * (1 + 1e-12)]
        balance = lambda net: min(net.layers[0].num_attention_heads / 4, net.layers[0].ffn_hidden_size / 48)  # noqa: E731
        most = max((balance(net), count_parameters(BLOCKS.model, net)) for net in fitting)
        found = Uniform(BLOCKS).select(budget(share))
        assert found in fitting and (balance(found), count_parameters(BLOCKS.model, found)) == most
        nested = MatFormer(BLOCKS).select(budget(share))
        assert all(layer.num_attention_heads == BLOCKS.model.num_attention_heads for layer in nested.layers)
        assert nested.is_uniform and COST.of(nested) <= share * COST.full * (1 + 1e-12)
    assert Uniform(BLOCKS).select(budget(1.0)) == MatFormer(BLOCKS).select(budget(1.0)) == SubNetwork.full(BLOCKS.model)


def test_uniform_balances_all_axes():
    """Uniform maximises the smallest share over the axes, even if other axes could be larger."""
    choices = family(4, hidden_size=[16, 24, 32], depth=[2, 3, 4], heads=[0.5, 0.75, 1.0], ffn_hidden_size=[0.5, 0.75, 1.0])
    cost = parameter_cost(choices.model, choices.space)

    def least(net: SubNetwork) -> float:
        layers = [layer for layer in net.layers if layer.executed]
        widths = layers[0].num_attention_heads / 4, layers[0].ffn_hidden_size / 48
        return min(*widths, net.hidden_size / 32, len(layers) / 4)

    known = Uniform(choices).networks()
    assert len(set(known)) == 81
    for share in (0.3, 0.45, 0.6, 0.8, 1.0):
        found = Uniform(choices).select([Budget(cost, share * cost.full)])
        fitting = [net for net in known if cost.of(net) <= share * cost.full * (1 + 1e-12)]
        assert (least(found), cost.of(found)) == max((least(net), cost.of(net)) for net in fitting)


def test_matformer_has_no_small_networks():
    with pytest.raises(
        FlextronError, match=r"selector=matformer: none of its 4 networks keeps to latency <= 7.088 ms: the smallest has"
    ):
        MatFormer(BLOCKS).select(budget(0.5))


def test_random_takes_the_best_of_its_draws():
    seen = []

    def losses(networks):
        seen.extend(networks)
        return [LOSS(net) for net in networks]

    def some_diverge(networks):
        return [float("nan") if i % 2 == 0 else LOSS(net) for i, net in enumerate(networks)]

    found = Random(BLOCKS, 20, 7, losses).select(budget(0.8))
    assert Random(BLOCKS, 20, 7, some_diverge).select(budget(0.8)) in seen[1::2]
    assert LOSS(found) == min(map(LOSS, seen)) and len(seen) > 3 and all(COST.of(net) <= 0.8 * COST.full for net in seen)


def test_sensitivity_is_exact_and_monotone():
    full = SubNetwork.full(BLOCKS.model)
    table = np.zeros(BLOCKS.exists_NK.shape)
    for block, k in np.ndindex(*table.shape):
        if BLOCKS.exists_NK[block, k]:
            table[block, k] = LOSS(BLOCKS.replaced(full, block, k))
    selector = Sensitivity(BLOCKS, table)
    value = lambda net: sum(table[block, k] for block, k in enumerate(BLOCKS.indices(net)))  # noqa: E731
    memory = memory_cost(BLOCKS.model, BLOCKS.space, "bf16", 64, 24)
    costs = []
    for share in np.linspace(COST.smallest / COST.full, 1, 30):
        found = selector.select(budget(share))
        best = min(value(net) for net in EVERY if COST.of(net) <= share * COST.full * (1 + 1e-12))
        assert value(found) == pytest.approx(best) and COST.of(found) <= share * COST.full * (1 + 1e-12)
        costs.append(COST.of(found))
        both = selector.select([*budget(share), Budget(memory, 0.8 * memory.full)])
        assert COST.of(both) <= share * COST.full * (1 + 1e-12) and memory.of(both) <= 0.8 * memory.full
    assert costs == sorted(costs)
