"""Adaptive routers in a forward pass: initial choice, noise, counting of tokens, padding."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.adaptive.routers import AdaptiveRouters
from flextron_mcore.adaptive.routing import AdaptiveRouting
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.routers.static import StaticRouters
from tests import toy
from tests.routing_toy import family


@pytest.fixture
def made():
    choices = family(2)
    static = StaticRouters(choices, 1, 16)
    torch.nn.init.normal_(static.out_NKU)
    routers = AdaptiveRouters(choices, 1, 8, static)
    return choices, routers, toy.model(choices.model, choices.space)


def run(model, routing, tokens, positions):
    with torch.no_grad(), use_subnetwork(model, routing):
        return model(tokens, positions, None)


def test_new_adaptive_routers_choose_what_the_static_ones_choose(made):
    choices, routers, model = made
    tokens, positions = toy.inputs()
    for target in (0.1, 0.5, 0.9):
        routing = AdaptiveRouting(routers, torch.tensor([target]))
        routing.begin()
        found = run(model, routing, tokens, positions)
        chosen = routers.static(torch.tensor([[target]]))[0].argmax(-1).tolist()
        expected = run(model, choices.network(chosen), tokens, positions)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert routing.counts_NK.argmax(-1).tolist() == chosen and (routing.counts_NK.sum(-1) == tokens.numel()).all()


def test_tokens_get_different_levels_and_noise_depends_on_seed_and_micro_batch(made):
    _, routers, model = made
    torch.nn.init.normal_(routers.out_NKU, std=3.0)
    tokens, positions = toy.inputs()

    def counts(number: int = 0, **settings) -> torch.Tensor:
        routing = AdaptiveRouting(routers, torch.tensor([0.5]), **settings)
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
    routing = AdaptiveRouting(routers, torch.tensor([0.5]), kv_policy)
    routing.begin(0, None, padding)
    found = run(model, routing, tokens, positions)
    assert (routing.counts_NK.sum(-1) == sum(lengths)).all()
    for row, length in enumerate(lengths):
        alone = AdaptiveRouting(routers, torch.tensor([0.5]), kv_policy)
        alone.begin()
        expected = run(model, alone, tokens[row : row + 1, :length], positions[:1, :length])
        torch.testing.assert_close(found[row, :length], expected[0], atol=1e-5, rtol=0)
    counted = AdaptiveRouting(routers, torch.tensor([0.5]), kv_policy)
    counted.begin(0, (~padding).float())
    run(model, counted, tokens, positions)
    assert (counted.counts_NK.sum(-1) == sum(lengths)).all()
