"""Choices: an elastic space as a list of blocks with candidates."""

from __future__ import annotations

import numpy as np

from flextron_mcore.choices import Choices
from flextron_mcore.cost import memory_cost, parameter_cost
from flextron_mcore.space import ElasticSpace, SubNetwork
from tests import toy


def test_networks_have_indices_of_candidates():
    arch = toy.config(num_layers=3, num_query_groups=2)
    for space in (
        ElasticSpace.build(arch, heads=[0.5, 1.0]),
        ElasticSpace.build(arch, attention_unit="query_head", heads=[2, 4]),
    ):
        choices = Choices(arch, space)
        assert choices.count == 6 and choices.sizes[:2] == [space.heads, space.ffn_hidden_size]
        assert choices.exists_NK.tolist() == [[True, True, False, False], [True] * 4] * 3
        for seed in range(10):
            net = toy.random_network(arch, space, seed)
            space.check(arch, net)
            assert choices.network(choices.indices(net)) == net
        assert choices.indices(SubNetwork.full(arch)) == [1, 3] * 3
        smaller = choices.replaced(SubNetwork.full(arch), 3, 0)
        assert choices.indices(smaller) == [1, 3, 1, 0, 1, 3]
        assert smaller.layers[1].ffn_hidden_size == space.ffn_hidden_size[0]


def test_costs_are_the_sums_of_the_table():
    arch = toy.config(num_layers=3)
    space = ElasticSpace.build(arch, heads=[0.5, 1.0])
    choices = Choices(arch, space)
    for cost in (parameter_cost(arch, space), memory_cost(arch, space, "bf16", 2, 24)):
        table = choices.costs_NK(cost)
        assert not table[~choices.exists_NK].any()
        for seed in range(10):
            net = toy.random_network(arch, space, seed)
            picked = np.take_along_axis(table, np.array(choices.indices(net))[:, None], 1)
            assert cost.constant + picked.sum() == cost.of(net)


def test_hidden_size_and_depth_are_blocks_too():
    arch = toy.config(num_layers=3)
    space = ElasticSpace.build(arch, heads=[0.5, 1.0], hidden_size=[8, 16, 32], depth=[1, 2, 3], layer_ranking=[1, 2, 0])
    layered, uniform = Choices(arch, space, all_axes=True), Choices(arch, space, all_axes=True, uniform=True)
    assert layered.sizes == [space.hidden_size, space.depth, *[space.heads, space.ffn_hidden_size] * 3] and layered.count == 8
    assert uniform.sizes == layered.sizes[:4]
    for seed in range(20):
        net = toy.random_network(arch, space, seed)
        assert layered.network(layered.indices(net)) == net
    assert [layer.executed for layer in layered.network([0, 1, 0, 0, 0, 0, 0, 0]).layers] == [False, True, True]
    net = uniform.network([1, 0, 0, 2])
    assert net == space.uniform(arch, 2, 36, 16, 1) and uniform.indices(net) == [1, 0, 0, 2]
    assert layered.network(layered.indices(SubNetwork.full(arch))) == SubNetwork.full(arch)
    # Candidates of a skipped layer add no value.
    values_NK = np.arange(32.0).reshape(8, 4)
    assert layered.total(values_NK, layered.network([1, 0, 1, 3, 0, 2, 1, 3])) == 1 + 4 + 16 + 22
    assert uniform.total(values_NK[:4], net) == 1 + 4 + 8 + 14
    for cost in (parameter_cost(arch, space), memory_cost(arch, space, "bf16", 2, 24)):
        assert cost.of(layered.least(cost)) == cost.of(uniform.least(cost)) == cost.smallest
