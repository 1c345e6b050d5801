"""The router over all axes learns from a made-up loss, in place of a language model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flextron_mcore.choices import Choices
from flextron_mcore.cost import Budget, parameter_cost
from flextron_mcore.routers.store import RouterInfo
from flextron_mcore.settings.sections import GumbelSettings
from flextron_mcore.space import ElasticSpace, SubNetwork, parameter_share
from flextron_mcore.training.gumbel import GumbelLearner
from flextron_mcore.training.router import RouterTraining
from tests import toy

STEPS = 450  # after 300 steps the argmax misses the target by 0.04 to 0.06, depending on the CPU's rounding
ARCH = toy.config(num_layers=4, vocab_size=11)
SPACE = ElasticSpace.build(
    ARCH, hidden_size=[0.5, 0.75, 1.0], depth=[2, 3, 4], heads=[0.5, 1.0], layer_ranking=[3, 0, 2, 1]
)  # fmt: skip
WORTH = {"hidden": 1.0, "layers": (0.5, 0.1, 0.2, 0.6), "heads": (0.05, 0.4, 0.05, 0.1), "neurons": (0.5, 0.05, 0.3, 0.05)}


def loss_of(hidden_K, layers_L, heads_LK, neurons_LK) -> torch.Tensor:
    """Loss of a weighted network above the full model's: a sum over missing parts, each raised to the power 1.5."""

    def missing(weights_K: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        return (1 - (weights_K * torch.tensor(sizes)).sum(-1) / sizes[-1]).clamp_min(0) ** 1.5

    found = WORTH["hidden"] * missing(hidden_K, SPACE.hidden_size)
    for layer in range(ARCH.num_layers):
        inside = WORTH["heads"][layer] * missing(heads_LK[layer], SPACE.heads)
        inside = inside + WORTH["neurons"][layer] * missing(neurons_LK[layer], SPACE.ffn_hidden_size)
        found = found + layers_L[layer] * inside + (1 - layers_L[layer]) * WORTH["layers"][layer]
    return found


def loss(axes: Choices, net: SubNetwork) -> float:
    def one_hot(size: int, sizes: tuple[int, ...]) -> list[float]:
        return [float(size == other) for other in sizes]

    layers = [layer if layer.executed else SubNetwork.full(ARCH).layers[0] for layer in net.layers]
    weights = (
        one_hot(net.hidden_size, SPACE.hidden_size),
        [float(layer.executed) for layer in net.layers],
        [one_hot(layer.num_attention_heads, SPACE.heads) for layer in layers],
        [one_hot(layer.ffn_hidden_size, SPACE.ffn_hidden_size) for layer in layers],
    )
    return float(loss_of(*map(torch.tensor, weights)))


def learner(uniform: bool = False, targets: int = 3, **settings) -> GumbelLearner:
    cost = parameter_cost(ARCH, SPACE)
    info = RouterInfo(("parameters",), ((cost.smallest / cost.full, 1.0),), 32, {}, "gumbel", uniform=uniform)
    choices = Choices(ARCH, SPACE, all_axes=True, uniform=uniform)
    return GumbelLearner(RouterTraining(choices, [cost], info, targets, 0, STEPS), GumbelSettings(**settings))


def train(taught: GumbelLearner, first: int = 0, last: int = STEPS) -> list[dict]:
    rows = []
    for step in range(first, last):
        generator = np.random.default_rng(step)
        full, losses, gradients = 3 + generator.normal(), [], []
        for net in taught.networks(step):
            if isinstance(net, SubNetwork):
                losses.append(full + loss(taught.choices, net))
                continue
            weights = [torch.tensor(part, requires_grad=True) for part in net[:4]]
            value = loss_of(*weights)
            gradients.append(torch.autograd.grad(value, weights))
            losses.append(full + value.item() + 0.005 * generator.normal())
        rows.append(taught.learn(step, [full, *losses], gradients))
    return rows


@pytest.fixture(scope="module", params=[False, True], ids=["layers", "uniform"])
def trained(request):
    taught = learner(request.param)
    return taught, train(taught)


def test_budgets_are_kept_used_monotone_and_well_spent(trained):
    """At 20 budgets that training never drew: kept, used, monotone, and better than random networks of the same cost."""
    taught, _ = trained
    (cost,), selector, axes = taught.costs, taught.selector(), taught.choices
    generator = np.random.default_rng(0)
    every = {axes.network([int(generator.integers(len(sizes))) for sizes in axes.sizes]) for _ in range(4000)}
    spent, better = [], []
    for share in np.linspace(cost.smallest / cost.full + 0.06, 0.97, 20):
        net = selector.select([Budget(cost, share * cost.full)])
        SPACE.check(ARCH, net)
        assert net.is_uniform or not axes.uniform
        spent.append(cost.of(net) / cost.full)
        assert spent[-1] <= share + 1e-9
        if not axes.uniform:  # uniform networks are sparser in cost
            assert spent[-1] > share - 0.02
        same = [other for other in every if spent[-1] - 0.02 <= cost.of(other) / cost.full <= spent[-1] and other != net]
        better += [loss(axes, other) > loss(axes, net) for other in same]
    assert spent == sorted(spent)
    # There are 72 uniform networks, so most budgets leave no choice; test_candidates.py compares all.
    assert len(better) > 30 and np.mean(better) > (0.7 if axes.uniform else 0.9)


def test_the_bare_argmax_follows_the_target(trained):
    taught, _ = trained
    cost = taught.costs[0]
    shares = np.linspace(0.3, 0.95, 14)
    off = [abs(cost.of(taught.argmax(share)) / cost.full - share) for share in shares]
    assert np.mean(off) < (0.08 if taught.choices.uniform else 0.05)


def test_noise_is_independent_on_every_axis_and_networks_differ():
    taught = learner(targets=4, weighted_per_step=1)
    noise_TNK = torch.cat([taught._noise(4, taught._generator(step, 0)) for step in range(500)])
    flat = noise_TNK.masked_fill(~taught.routers.exists_NK, 0).flatten(1)
    kept = flat[:, taught.routers.exists_NK.flatten()]
    correlation = torch.corrcoef(kept.T)
    assert (correlation - torch.eye(len(correlation))).abs().max() < 0.12
    assert abs(float(kept.mean()) - 0.5772) < 0.02  # the mean of Gumbel noise is Euler's constant


def test_weights_are_relaxed_first_and_hard_later():
    taught = learner(soft_until=0.5)
    first, *slices = taught.networks(0)
    assert isinstance(first, list) and all(isinstance(net, SubNetwork) for net in slices)
    assert 0 < max(first[0]) < 1 and sum(first[0]) == pytest.approx(1)
    hard = taught.networks(STEPS // 2)[0]
    assert sorted(hard[0]) == [0, 0, 1]
    depth = int(sum(hard[1]))
    assert hard[1] == [float(layer in SPACE.layer_ranking[:depth]) for layer in range(4)]


@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_the_share_of_the_parameters_is_the_drawn_networks(step):
    """The share of parameters is the chosen slice's, also while the forward pass has relaxed weights of the same draws."""
    taught, sliced = (learner(weighted_per_step=count) for count in (3, 0))
    rows = taught.networks(step)
    assert [row[4] for row in rows] == [parameter_share(ARCH, net) for net in sliced.networks(step)]
    assert len({row[4] for row in rows}) > 1


def test_training_continues_exactly(tmp_path):
    whole, part = learner(), learner()
    rows = train(whole, 0, 30)
    train(part, 0, 20)
    part.write(tmp_path)
    again = learner()
    again.read(tmp_path)
    assert train(again, 20, 30) == rows[20:]
    for one, other in zip(whole.routers.parameters(), again.routers.parameters(), strict=True):
        assert one.equal(other)
