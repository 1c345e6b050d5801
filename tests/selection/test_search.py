"""Search for networks worth evaluating, with known losses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flextron_mcore.choices import Choices
from flextron_mcore.cost import parameter_cost
from flextron_mcore.selection.search import worth_evaluating
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.routing_toy import family, latency, true_loss

ARCH = toy.config(num_layers=3)
SPACE = ElasticSpace.build(ARCH, hidden_size=[0.5, 1.0], depth=[2, 3], heads=[0.5, 1.0], layer_ranking=[2, 0, 1])
COST = parameter_cost(ARCH, SPACE)


def drawn(choices, count: int, seed: int = 0) -> list:
    generator = np.random.default_rng(seed)
    rows = [[int(generator.integers(len(sizes))) for sizes in choices.sizes] for _ in range(count)]
    return list(dict.fromkeys(map(choices.network, rows)))


@pytest.mark.parametrize(
    "choices",
    [family(3), Choices(ARCH, SPACE, all_axes=True), Choices(ARCH, SPACE, all_axes=True, uniform=True)],
    ids=["blocks", "axes", "uniform"],
)
def test_moves_have_the_difference_of_the_networks_costs(choices):
    cost = latency(choices) if not choices.all_axes else COST
    for net in drawn(choices, 12):
        moves_NK, own = choices.moves_NK(net, cost), choices.indices(net)
        assert moves_NK.shape == choices.exists_NK.shape
        for block, candidate in itertools.product(*map(range, moves_NK.shape)):
            if np.isfinite(moves_NK[block, candidate]):
                other = choices.network([*own[:block], candidate, *own[block + 1 :]])
                assert other != net and (other.hidden_size, other.depth) == (net.hidden_size, net.depth)
                assert moves_NK[block, candidate] == pytest.approx(cost.of(other) - cost.of(net), rel=1e-9, abs=1e-9)
        changeable = 2 if getattr(choices, "uniform", False) else 2 * (net.hidden_size, net.depth)[1]
        assert np.isfinite(moves_NK).any(-1).sum() == changeable


def test_proposals_are_new_near_and_of_the_same_size():
    choices, span = Choices(ARCH, SPACE, all_axes=True), 0.05 * COST.full
    known = dict.fromkeys(drawn(choices, 30), 1.0)
    near = list(known)[:10]
    found = worth_evaluating(choices, COST, known, near, span)
    assert len(found) == len(set(found)) and not known.keys() & set(found) and len(found) > 5
    for net in found:
        sources = [
            other
            for other in near
            if (other.hidden_size, other.depth) == (net.hidden_size, net.depth)
            and sum(a != b for a, b in zip(choices.indices(other), choices.indices(net), strict=True)) <= 2
            and abs(COST.of(other) - COST.of(net)) <= span * (1 + 1e-9)
        ]
        assert sources


def test_the_best_of_a_cost_is_found_from_few_that_were_evaluated():
    """With a nearly additive loss, the search finds the best network of a cost from few evaluations."""
    choices = family(3)
    cost, loss = latency(choices), true_loss(choices, seed=3)
    every = list(map(choices.network, itertools.product(*(range(len(sizes)) for sizes in choices.sizes))))
    losses = {net: loss(net) for net in drawn(choices, 60)}
    highs, span = [share * cost.full for share in np.linspace(0.5, 1, 26)], 0.02 * cost.full

    def best(known) -> list:
        inside = [[net for net in known if high - span <= cost.of(net) <= high * (1 + 1e-12)] for high in highs]
        return [min(nets, key=loss, default=None) for nets in inside]

    before = best(losses)
    for _ in range(6):
        near = dict.fromkeys(net for net in best(losses) if net)
        losses |= {net: loss(net) for net in worth_evaluating(choices, cost, losses, near, span)}
    perfect, found = best(every), best(losses)
    assert len(losses) < 0.1 * len(every)
    assert sum(a == b for a, b in zip(perfect, found, strict=True)) > len(highs) / 2
    missed = [[loss(a) - loss(b) for a, b in zip(nets, perfect, strict=True) if a] for nets in (before, found)]
    assert np.mean(missed[1]) < 0.02 * np.mean(missed[0])


def test_proposals_use_the_largest_allowed_change_of_cost():
    choices = family(3)
    cost = latency(choices)
    known = {net: 3 - cost.of(net) / cost.full for net in drawn(choices, 40)}
    every = list(map(choices.network, itertools.product(*(range(len(sizes)) for sizes in choices.sizes))))
    for net in list(known)[:6]:
        own = choices.indices(net)
        reached = [other for other in every if sum(a != b for a, b in zip(choices.indices(other), own, strict=True)) <= 2]
        steps = [(cost.of(other) - cost.of(net)) / cost.full for other in reached if other not in known]
        wanted = [max(step for step in steps if low <= step <= high) for low, high in ((-0.05, 0), (0, 0.05))]
        found = worth_evaluating(choices, cost, known, [net], 0.05 * cost.full)
        assert [(cost.of(other) - cost.of(net)) / cost.full for other in found] == pytest.approx(wanted)
