"""Adaptive routers by themselves: where they start, noise, counting, padding; and which target a budget finds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from flextron_mcore.adaptive.cost import RoutingCost
from flextron_mcore.adaptive.evaluation import average, calibrate, each_cost, target_for
from flextron_mcore.adaptive.routers import AdaptiveRouters, TokenRouting
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import FlextronError
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.space import SubNetwork
from tests import toy
from tests.routing_toy import family, latency


@pytest.fixture
def made():
    blocks = family(2)
    static = StaticRouters(blocks, 1, 16)
    torch.nn.init.normal_(static.out_NKU)
    routers = AdaptiveRouters(blocks, 1, 8, static)
    return blocks, routers, toy.model(blocks.model, blocks.space)


def run(model, routing, tokens, positions):
    with torch.no_grad(), use_subnetwork(model, routing):
        return model(tokens, positions, None)


def test_they_start_where_the_static_ones_ended(made):
    blocks, routers, model = made
    tokens, positions = toy.inputs()
    for target in (0.1, 0.5, 0.9):
        routing = TokenRouting(routers, torch.tensor([target]))
        routing.begin()
        found = run(model, routing, tokens, positions)
        chosen = routers.static(torch.tensor([[target]]))[0].argmax(-1).tolist()
        expected = run(model, blocks.network(chosen), tokens, positions)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert routing.counts_NK.argmax(-1).tolist() == chosen and (routing.counts_NK.sum(-1) == tokens.numel()).all()


def test_tokens_choose_for_themselves_and_noise_is_that_of_seed_and_micro_batch(made):
    _, routers, model = made
    torch.nn.init.normal_(routers.out_NKU, std=3.0)
    tokens, positions = toy.inputs()

    def counts(number: int = 0, **settings) -> torch.Tensor:
        routing = TokenRouting(routers, torch.tensor([0.5]), **settings)
        routing.begin(number)
        run(model, routing, tokens, positions)
        return routing.counts_NK

    assert ((counts() > 0).sum(-1) > 1).any() and counts().equal(counts())
    noisy = counts(noise=3.0, seed=1)
    assert noisy.equal(counts(noise=3.0, seed=1)) and not noisy.equal(counts())
    assert not noisy.equal(counts(noise=3.0, seed=2)) and not noisy.equal(counts(1, noise=3.0, seed=1))


@pytest.mark.parametrize("kv_policy", ["full", "own"])
def test_padding_is_never_routed_and_never_counted(made, kv_policy):
    _, routers, model = made
    torch.nn.init.normal_(routers.out_NKU, std=3.0)
    tokens, positions = toy.inputs()
    lengths = (toy.LENGTH, 9)
    padding = torch.arange(toy.LENGTH) >= torch.tensor(lengths)[:, None]
    routing = TokenRouting(routers, torch.tensor([0.5]), kv_policy)
    routing.begin(0, None, padding)
    found = run(model, routing, tokens, positions)
    assert (routing.counts_NK.sum(-1) == sum(lengths)).all()
    for row, length in enumerate(lengths):
        alone = TokenRouting(routers, torch.tensor([0.5]), kv_policy)
        alone.begin()
        expected = run(model, alone, tokens[row : row + 1, :length], positions[:1, :length])
        torch.testing.assert_close(found[row, :length], expected[0], atol=1e-5, rtol=0)
    counted = TokenRouting(routers, torch.tensor([0.5]), kv_policy)
    counted.begin(0, (~padding).float())
    run(model, counted, tokens, positions)
    assert (counted.counts_NK.sum(-1) == sum(lengths)).all()


def test_the_average_cost_of_a_pure_mix_is_the_networks(made):
    blocks, _, _ = made
    cost = latency(blocks)
    net = toy.random_network(blocks.model, blocks.space, 3)
    pure = torch.eye(4)[blocks.indices(net)].numpy()
    assert average(cost, blocks, pure) == pytest.approx(cost.of(net))
    full = torch.eye(4)[blocks.indices(SubNetwork.full(blocks.model))].numpy()
    assert average(cost, blocks, (pure + full) / 2) == pytest.approx((cost.of(net) + cost.full) / 2)


@pytest.mark.parametrize(
    "which, added",
    [  # of attention, MLP, attention, MLP below
        (0, 3 * 1 + 5 * 1 + 3 * 0 + 5 * (1 - 0.999**1000)),
        (1, 3 * 1 + 5 * 3 + 3 * 0 + 5 * (1 - 0.999**1000)),
        (2, 3 * 0.125 + 5 * 0.375 + 3 * 0 + 5 * (0.25 + (1 - 0.999**1000) * 0.75 - (0.999 * 0.25 + 0.001))),
    ],
)
def test_it_costs_something_that_tokens_differ(which, added):
    """That they do, each further level, and what lies above a token's own: as far as a pass has tokens of a level."""
    blocks = family(2)  # sizes are a fourth, a half, three fourths and all
    cost = latency(blocks)
    overhead = {axis: tuple(value * (i == which) for i in range(3)) for axis, value in (("heads", 3.0), ("ffn_hidden_size", 5.0))}
    mixed = RoutingCost.of_levels(cost, cost.candidates, overhead, tokens=1000)
    pure, share_NK = np.eye(4)[[0, 1, 2, 3]], np.array([[0.5, 0.5, 0, 0], [0.25] * 4, [0, 0, 0, 1], [0.999, 0, 0, 0.001]])
    assert average(mixed, blocks, pure) == pytest.approx(average(cost, blocks, pure))
    assert average(mixed, blocks, share_NK) - average(cost, blocks, share_NK) == pytest.approx(added, rel=1e-6)
    alone = replace(mixed, tokens=1)  # a token has one level
    assert average(alone, blocks, share_NK) == pytest.approx(average(cost, blocks, share_NK))
    each_S = each_cost(mixed, blocks, np.array([[0, 1, 2, 3]] * blocks.count))
    assert each_S.mean() == pytest.approx(average(mixed, blocks, np.full((blocks.count, 4), 0.25)))


def test_calibration_finds_the_steps():
    asked = []

    def spent(target: float) -> float:
        asked.append(target)
        return 0.5 + 0.2 * target + 0.15 / (1 + math.exp((0.34 - target) * 300)) + 0.15 * (target > 0.7)

    found = calibrate(spent)
    assert len(asked) == len(set(asked)) == len(found) < 64 and found == sorted(found)
    for share in (0.55, 0.58, 0.6, 0.65, 0.7, 0.75, 0.95):
        assert spent(target_for(found, share)) == pytest.approx(share, abs=0.008), share
    # One that cannot be spent, in the middle of a jump, gets one of its ends; where all targets are alike, few are asked.
    assert min(abs(spent(target_for(found, 0.85)) - end) for end in (0.79, 0.94)) < 0.005
    assert len(calibrate(lambda target: 0.6)) == 9


def test_a_budget_finds_its_target():
    calibration = [(0.0, 0.55), (0.5, 0.6), (0.75, 0.59), (1.0, 0.9)]
    assert target_for(calibration, 0.575) == pytest.approx(0.25)
    assert target_for(calibration, 0.59) == pytest.approx(0.4) and target_for(calibration, 0.6) == 0.5
    assert target_for(calibration, 0.745) == pytest.approx(0.875)
    assert target_for(calibration, 0.5, nearest=True) == 0.0 and target_for(calibration, 0.97, nearest=True) == 1.0
    steps = [(0.25, 0.5), (0.25 + 1 / 1024, 0.6), (0.5, 0.6), (0.5 + 1 / 1024, 0.612), (1.0, 0.9)]
    assert [target_for(steps, share) for share in (0.54, 0.56)] == [0.25, 0.25 + 1 / 1024]
    assert target_for(steps, 0.603) == pytest.approx(0.5 + 0.25 / 1024)  # not wide enough for one
    assert target_for(steps, 0.5) == 0.25 and target_for(steps, 0.9) == 1.0
    # Falling first, as with routers of little training: what is spent further on is in reach.
    falls = [(0.0, 0.88), (0.25, 0.8), (0.5, 0.85), (1.0, 0.95)]
    assert [target_for(falls, share) for share in (0.8, 0.82, 0.86)] == pytest.approx([0.25, 0.35, 0.55])
    assert target_for([(0.0, 0.9), (1.0, 0.7)], 0.75) == 1.0 and target_for([(0.0, 0.6), (1.0, 0.6)], 0.6) == 0.0
    with pytest.raises(FlextronError, match=r"spend 0.550 to 0.900 of the full model's, not 0.500"):
        target_for(calibration, 0.5)
    with pytest.raises(FlextronError, match="no calibration"):
        target_for([], 0.5)
