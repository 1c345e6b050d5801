"""Static routers: logits, initial choice, gradients, gates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flextron_mcore.choices import Choices
from flextron_mcore.routers.static import StaticRouters, gates, log_probabilities
from flextron_mcore.space import ElasticSpace
from tests import toy

ARCH = toy.config(num_layers=3)
BLOCKS = Choices(ARCH, ElasticSpace.build(ARCH, heads=[0.5, 1.0]))


def trained(costs: int = 1) -> StaticRouters:
    torch.manual_seed(1)
    routers = StaticRouters(BLOCKS, costs, 16)
    with torch.no_grad():
        routers.out_NKU.normal_()
    return routers


def test_logits_of_candidates_that_exist():
    routers = trained(2)
    logits = routers(torch.rand(5, 2))
    assert logits.shape == (5, 6, 4)
    assert torch.isfinite(logits).equal(torch.from_numpy(BLOCKS.exists_NK).expand(5, -1, -1))
    assert torch.softmax(logits, -1).sum(-1).allclose(torch.ones(5, 6))


def test_the_full_model_is_what_untrained_routers_prefer():
    log_p = log_probabilities(StaticRouters(BLOCKS, 1, 16))
    assert BLOCKS.network(log_p([0.3]).argmax(-1).tolist()).layers[0].ffn_hidden_size == ARCH.ffn_hidden_size


def test_routers_are_independent_and_tell_targets_apart():
    routers = trained()
    targets = torch.linspace(0, 1, 40)[:, None]
    before = routers(targets).softmax(-1)
    assert len({tuple(row) for row in before.argmax(-1).tolist()}) > 5
    with torch.no_grad():
        routers.out_NKU[2] += torch.randn(4, 16)
    changed = (routers(targets).softmax(-1) - before).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == [False, False, True, False, False, False]


def test_gradients_reach_every_parameter():
    routers = trained()
    probabilities = routers(torch.rand(8, 1)).softmax(-1)
    (probabilities * torch.rand_like(probabilities)).sum().backward()
    for name, parameter in routers.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name


def test_gates_are_one_and_have_the_gradient_of_the_probability():
    logits = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(4, (2, 6))
    values = gates(logits, indices)
    assert values.tolist() == torch.ones(2, 6).tolist()
    weights = torch.randn(2, 6, dtype=torch.float64)
    (values * weights).sum().backward()
    p = logits.detach().softmax(-1)
    expected = weights[..., None] * (torch.nn.functional.one_hot(indices, 4) - p)
    assert torch.allclose(logits.grad, expected)


def test_numpy_and_torch_give_the_same_arrays():
    routers = trained(2)
    found = log_probabilities(routers)([0.2, 0.9])
    expected = routers(torch.tensor([[0.2, 0.9]])).log_softmax(-1)[0]
    assert np.exp(found) == pytest.approx(expected.exp().detach().numpy())
