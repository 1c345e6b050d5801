"""`importance` table of losses before training: networks with half of each axis, and warnings of orders no better than random."""

from __future__ import annotations

import pytest

from flextron_mcore.sorting.ablation import ablation_networks, no_better_than_random
from flextron_mcore.sorting.importance import random_scores
from flextron_mcore.space import ElasticSpace
from tests import toy


def test_networks_of_half_of_one_axis():
    arch = toy.config(num_layers=4)
    space = ElasticSpace.build(arch, hidden_size=[0.5, 1.0], depth=[0.5, 1.0], layer_ranking=[3, 0, 1, 2])
    full, *halves = ablation_networks(arch, space)
    assert full.network is None and [half.name for half in halves] == [
        "2 of 4 heads",
        "24 of 48 FFN neurons",
        "16 of 32 hidden channels",
        "2 of 4 layers",
    ]
    depth = halves[-1].network
    assert [layer.executed for layer in depth.layers] == [True, False, False, True] and depth.hidden_size == 32


@pytest.mark.parametrize("loss, said", [(2.9, 0), (3.0, 1), (3.1, 1)])
def test_an_order_no_better_than_a_random_one_is_named(loss, said):
    rows = [
        {"setup": "2 of 4 heads", "order": order, "score": score, "loss": value}
        for order, score, value in (("unsorted", "", 9.0), ("random", "", 3.0), ("sorted", "energy", loss))
    ]
    found = no_better_than_random(rows)
    assert len(found) == said and all("2 of 4 heads sorted by energy" in line and "3.000" in line for line in found)
    assert not no_better_than_random([row for row in rows if row["order"] != "random"])


@pytest.mark.parametrize("unit, shape", [("kv_group", (2,)), ("query_head", (2, 2))])
def test_random_scores_are_those_of_the_seed(unit, shape):
    arch = toy.config(num_query_groups=2)
    space = ElasticSpace.build(arch, granularity=1, attention_unit=unit, heads=[2, 4])
    first, again, other = (random_scores(arch, space, seed) for seed in (1, 1, 2))
    assert first.layers[1].units["heads"].shape == shape and first.channels.equal(again.channels)
    assert first.layers[1].units["ffn_hidden_size"].equal(again.layers[1].units["ffn_hidden_size"])
    assert not first.channels.equal(other.channels) and first.layers[0].influence != first.layers[1].influence
