"""A space as a list of blocks."""

from __future__ import annotations

import numpy as np

from flextron_mcore.blocks import Blocks
from flextron_mcore.cost import memory_cost, parameter_cost
from flextron_mcore.space import ElasticSpace, SubNetwork
from tests import toy


def test_networks_and_candidates():
    arch = toy.config(num_layers=3, num_query_groups=2)
    for space in (
        ElasticSpace.build(arch, heads=[0.5, 1.0]),
        ElasticSpace.build(arch, attention_unit="query_head", heads=[2, 4]),
    ):
        blocks = Blocks(arch, space)
        assert blocks.count == 6 and blocks.sizes[:2] == [space.heads, space.ffn_hidden_size]
        assert blocks.exists_NK.tolist() == [[True, True, False, False], [True] * 4] * 3
        for seed in range(10):
            net = toy.random_network(arch, space, seed)
            space.check(arch, net)
            assert blocks.network(blocks.indices(net)) == net
        assert blocks.indices(SubNetwork.full(arch)) == [1, 3] * 3
        smaller = blocks.replaced(SubNetwork.full(arch), 3, 0)
        assert blocks.indices(smaller) == [1, 3, 1, 0, 1, 3]
        assert smaller.layers[1].ffn_hidden_size == space.ffn_hidden_size[0]


def test_costs_are_the_sums_of_the_table():
    arch = toy.config(num_layers=3)
    space = ElasticSpace.build(arch, heads=[0.5, 1.0])
    blocks = Blocks(arch, space)
    for cost in (parameter_cost(arch, space), memory_cost(arch, space, "bf16", 2, 24)):
        table = blocks.costs_NK(cost)
        assert not table[~blocks.exists_NK].any()
        for seed in range(10):
            net = toy.random_network(arch, space, seed)
            picked = np.take_along_axis(table, np.array(blocks.indices(net))[:, None], 1)
            assert cost.constant + picked.sum() == cost.of(net)
