"""Rows of the tables of `flextron compare`."""

from __future__ import annotations

from types import SimpleNamespace

from flextron_mcore.evaluation.comparison import random_row
from flextron_mcore.space import ElasticSpace
from tests import toy


def test_the_routers_own_network_is_not_counted_among_random_ones():
    arch = toy.config()
    space = ElasticSpace.build(arch, granularity=1, heads=[2, 4], ffn_hidden_size=[12, 48])
    nets = [space.uniform(arch, *sizes) for sizes in ((2, 12), (2, 48), (4, 12), (4, 48))]
    losses = SimpleNamespace(mean=dict(zip(nets, (3.0, 2.0, 4.0, 1.0), strict=True)).__getitem__)
    cost = SimpleNamespace(of=lambda net: 1.0, full=2.0)
    row = {"selector": "router", "target": 0.5, "subnetwork": nets[1].to_dict(), "share": 0.5, "mean_loss": 2.0}
    assert random_row(0.5, nets, cost, losses, [row])["better_than"] == 2 / 3
    assert random_row(0.5, nets[1:2], cost, losses, [row])["better_than"] is None
    assert random_row(0.5, nets, cost, losses, [])["better_than"] is None
