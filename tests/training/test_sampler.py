"""Random networks are uniform, independent, and a function of (seed, step) alone."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from itertools import combinations

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.flops import Costs
from flextron_mcore.launch import flops
from flextron_mcore.space import ElasticSpace, parameter_share
from flextron_mcore.training.sampler import draw, mixture
from tests import toy

ARCH = toy.config(num_layers=3)
SPACE = ElasticSpace.build(ARCH)


def test_a_draw_depends_on_seed_step_and_stream_only():
    first = [draw(ARCH, SPACE, 1, step, 3) for step in range(20)]
    assert first == [draw(ARCH, SPACE, 1, step, 3) for step in range(20)]
    assert draw(ARCH, SPACE, 1, 7, 3) == first[7]  # no state: a resumed run draws the same
    assert first != [draw(ARCH, SPACE, 2, step, 3) for step in range(20)]
    assert first != [draw(ARCH, SPACE, 1, step, 3, stream=1) for step in range(20)]
    assert len({net for nets in first for net in nets}) > 50
    widths = [[(layer.num_attention_heads, layer.ffn_hidden_size) for layer in net.layers] for net in draw(ARCH, SPACE, 1, 0, 2)]
    assert widths == [[(2, 36), (1, 48), (1, 24)], [(1, 12), (1, 48), (1, 24)]]  # the same in every version


def chi_square(counts: Counter, cells: int) -> float:
    expected = sum(counts.values()) / cells
    return sum((counts.get(cell, 0) - expected) ** 2 / expected for cell in range(cells))


def test_draws_are_uniform_and_independent():
    heads, widths, pairs, layers = Counter(), Counter(), Counter(), Counter()
    for step in range(5000):
        nets = draw(ARCH, SPACE, 5, step, 4)  # 20 000 networks
        for net in nets:
            h = [SPACE.heads.index(layer.num_attention_heads) for layer in net.layers]
            w = [SPACE.ffn_hidden_size.index(layer.ffn_hidden_size) for layer in net.layers]
            heads.update(h)
            widths.update(w)
            pairs[4 * h[0] + w[0]] += 1
            layers[4 * w[0] + w[1]] += 1
    # 0.999 quantiles of chi-square with 3 and 15 degrees of freedom
    assert chi_square(heads, 4) < 16.3 and chi_square(widths, 4) < 16.3
    assert chi_square(pairs, 16) < 37.7 and chi_square(layers, 16) < 37.7


def test_hidden_sizes_and_depths_are_uniform_and_independent_too():
    """Elastic hidden size and depth do not change the widths that a seed draws."""
    space = ElasticSpace.build(ARCH, hidden_size=[0.25, 0.5, 1.0], depth=[1, 2, 3], layer_ranking=[2, 0, 1])
    networks = [net for step in range(600) for net in draw(ARCH, space, 5, step, 3)]
    for net in networks[:50]:
        space.check(ARCH, net)
        depth = sum(layer.executed for layer in net.layers)
        assert {i for i, layer in enumerate(net.layers) if layer.executed} == set(space.layer_ranking[:depth])
    pairs = [(space.hidden_size.index(net.hidden_size), sum(layer.executed for layer in net.layers) - 1) for net in networks]
    assert chi_square(Counter(3 * hidden + depth for hidden, depth in pairs), 9) < 26.1  # 0.999 quantile, 8 degrees of freedom
    for net, plain in zip(networks, (net for step in range(600) for net in draw(ARCH, SPACE, 5, step, 3)), strict=True):
        assert all(ours == theirs for ours, theirs in zip(net.layers, plain.layers, strict=True) if ours.executed)


def test_networks_of_a_step_repeat_as_often_as_chance_has_it():
    """16 networks in the space: each of the 3 pairs of a step is a repetition with probability 1/16."""
    arch = toy.config(num_layers=1)
    space, steps = ElasticSpace.build(arch), 6667
    repeats = sum(a == b for s in range(steps) for a, b in combinations(draw(arch, space, 3, s, 3), 2))
    following = sum(draw(arch, space, 3, s, 1) == draw(arch, space, 3, s + 1, 1) for s in range(steps))
    for found, trials in ((repeats, 3 * steps), (following, steps)):
        deviation = (trials / 16 * 15 / 16) ** 0.5
        assert abs(found - trials / 16) < 4 * deviation


def test_networks_are_members_of_the_space():
    for unit, groups in (("kv_group", 4), ("query_head", 2)):
        arch = toy.config(num_query_groups=groups)
        space = ElasticSpace.build(arch, attention_unit=unit, heads=[0.5, 1.0])
        for step in range(30):
            for net in draw(arch, space, 0, step, 2):
                space.check(arch, net)


def test_matformer_draws_uniform_widths_with_all_heads_and_no_repeats():
    for step in range(30):
        nets = draw(ARCH, SPACE, 0, step, 3, "matformer")
        assert all(net.is_uniform and net.layers[0].num_attention_heads == 4 for net in nets)
        assert sorted(net.layers[0].ffn_hidden_size for net in nets) == list(SPACE.ffn_hidden_size[:-1])
    assert len(draw(ARCH, SPACE, 0, 0, 7, "matformer")) == 7
    assert draw(ARCH, SPACE, 0, 0, 0, "matformer") == []


AXES_SPACE = ElasticSpace.build(ARCH, hidden_size=[0.25, 0.5, 1.0], depth=[1, 2, 3], layer_ranking=[2, 0, 1])


@pytest.mark.parametrize("space", [SPACE, AXES_SPACE], ids=["widths", "all axes"])
def test_budgets_are_drawn_as_often_as_their_weights_say(space):
    """Networks of a budget have its parameters on average, and the budget that the log notes is the one that was drawn."""
    least = parameter_share(ARCH, space.uniform(ARCH, *(sizes[0] for sizes in space.sizes.values())))
    low, middle = round(least + 0.1, 3), round((least + 1) / 2, 3)
    of = mixture(ARCH, space, {str(middle): 2, "1": 1, str(low): 5})
    assert (of.budgets, of.probabilities) == ((low, middle, 1.0), (0.625, 0.25, 0.125))
    shares: dict[float, list[float]] = {}
    for step in range(1500):
        nets = draw(ARCH, space, 7, step, 2, of=of)
        for budget, net in zip(of.drawn(7, step, 2), nets, strict=True):
            space.check(ARCH, net)
            shares.setdefault(budget, []).append(parameter_share(ARCH, net))
    for budget, probability in zip(of.budgets, of.probabilities, strict=True):
        found, spread = shares[budget], (3000 * probability * (1 - probability)) ** 0.5
        assert abs(len(found) - 3000 * probability) < 4 * spread
        error = statistics.pstdev(found) / len(found) ** 0.5
        assert abs(statistics.fmean(found) - budget) < 4 * error + 1e-6
    assert set(shares[1.0]) == {1.0} and len(set(shares[middle])) > 10
    assert draw(ARCH, space, 7, 3, 2, of=of) == draw(ARCH, space, 7, 3, 2, of=of) != draw(ARCH, space, 7, 3, 2)
    estimated = Costs(ARCH, space, 24)
    drawn = [estimated.of(net) for step in range(1500) for net in draw(ARCH, space, 7, step, 2, of=of)]
    weights = {str(middle): 2, "1": 1, str(low): 5}
    assert flops.drawn(estimated, "flextron", weights) == pytest.approx(statistics.fmean(drawn), rel=0.02)


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"0.01": 1}, r"budget_weights: 0.01 is not within 0\.\d+ \(the smallest network's share of the parameters\) and 1"),
        ({"1.5": 1}, r"budget_weights: 1.5 is not within"),
        ({"half": 1}, r"budget_weights: half is not within"),
        ({"0.9": 0}, r"budget_weights: has no finite weight above 0: give"),
        ({}, r"budget_weights: has no finite weight"),
        ({"0.9": math.inf}, r"budget_weights: has no finite weight"),
    ],
)
def test_budgets_that_cannot_be(weights, message):
    with pytest.raises(FlextronError, match=message):
        mixture(ARCH, SPACE, weights)


def test_unknown_mode():
    with pytest.raises(FlextronError, match="mode='flex' is not known: use one of flextron, matformer"):
        draw(ARCH, SPACE, 0, 0, 1, "flex")
