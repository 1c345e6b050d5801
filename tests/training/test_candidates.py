"""Evaluation of candidate networks: budgets get the network with the best measured loss."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from flextron_mcore.choices import Choices
from flextron_mcore.cost import Budget
from flextron_mcore.selection import router
from flextron_mcore.selection.router import WITHIN
from flextron_mcore.selection.selectors import Uniform
from flextron_mcore.space import SubNetwork
from flextron_mcore.training import candidates
from flextron_mcore.training.candidates import evaluate_candidates
from flextron_mcore.training.static import StraightThroughLearner
from tests.routing_toy import family, latency, true_loss
from tests.training import test_gumbel as gumbel
from tests.training.test_static import learner, train

BIN = 0.005  # width of a cost bin, twice the default: half as many bins, for speed


@pytest.fixture(autouse=True)
def wide_bins(monkeypatch):
    for place in (router, candidates):
        monkeypatch.setattr(place, "BIN", BIN)


def test_budgets_get_better_networks():
    """After brief training on noisy losses, evaluation improves the answers, although only its last round is without noise."""
    choices = family(4)
    cost, loss = latency(choices), true_loss(choices)
    taught = learner(choices, [cost], max_steps=80)
    train(choices, taught, 0, 80, noise=0.05)
    rounds: list[tuple[int, int]] = []
    tried: list[set[SubNetwork]] = []

    def evaluate(networks, samples: int) -> list[float]:
        tried.append(set(networks))
        rounds.append((len(networks), samples))
        noise = np.random.default_rng(0).normal(scale=0.002 if samples < 64 else 0.0, size=len(networks))
        return [2 + loss(net) + more for net, more in zip(networks, noise, strict=True)]

    before = taught.selector()
    losses = evaluate_candidates(taught, evaluate, 64)
    assert [samples for _, samples in rounds] == [8] * 7 + [64]
    assert all(count > 0 for count, _ in rounds)
    assert tried[0].issuperset(Uniform(choices).networks())
    assert sum(count for count, _ in rounds[:-1]) > 1.5 * rounds[-1][0] > 0
    assert all(losses[net] == 2 + loss(net) for net in losses) and len(losses) <= rounds[-1][0]
    taught.info = replace(taught.info, evaluated=tuple((tuple(choices.indices(net)), value) for net, value in losses.items()))
    after = taught.selector()
    shares = np.linspace(cost.smallest / cost.full + 0.02, 1, 40)
    gains, spent = [], []
    for share in shares:
        old, new = (selector.select([Budget(cost, share * cost.full)]) for selector in (before, after))
        assert new in losses and cost.of(new) <= share * cost.full * (1 + 1e-9)
        assert cost.of(new) >= cost.of(old) - (WITHIN + 2 * BIN) * cost.full
        gains.append(loss(old) - loss(new))
        spent.append(cost.of(new))
    assert spent == sorted(spent)
    # Tolerance for the noise of early rounds, and for budgets between two bins.
    assert np.mean(gains) > 0.003 and np.mean(np.array(gains) < -0.002) <= 0.05
    assert after.select([Budget(cost, cost.full)]) == before.select([Budget(cost, cost.full)])


def test_a_space_of_many_uniform_networks_makes_none_of_them(monkeypatch):
    choices = family(4)
    taught = learner(choices, [latency(choices)], max_steps=1)
    every = Uniform(choices).networks()
    assert candidates._uniform(taught.choices) == every
    monkeypatch.setattr(candidates, "_UNIFORM", len(every) - 1)
    monkeypatch.setattr(Uniform, "networks", lambda self: pytest.fail("made networks that are not evaluated"))
    assert candidates._uniform(taught.choices) == []


def test_the_best_network_of_a_small_space_is_found():
    """In a small space the best network of nearly every budget is found even with untrained routers and no surrogate."""
    choices = family(2)
    cost, loss = latency(choices), true_loss(choices)
    taught = learner(choices, [cost], max_steps=20, kind=StraightThroughLearner)
    train(choices, taught, 0, 5)
    tried: list[set[SubNetwork]] = []

    def evaluate(networks, samples: int) -> list[float]:
        tried.append(set(networks))
        return [loss(net) for net in networks]

    likeliest = {found[-1] for found in taught.selector().bins(cost) if found}
    losses = evaluate_candidates(taught, evaluate, 2)
    every = {choices.network(row) for row in itertools.product(*(range(len(sizes)) for sizes in choices.sizes))}
    assert likeliest <= tried[0] <= every and losses.keys() <= tried[0]
    taught.info = replace(taught.info, evaluated=tuple((tuple(choices.indices(net)), value) for net, value in losses.items()))
    beaten = []
    for share in np.linspace(cost.smallest / cost.full + 0.01, 1, 30):
        value = loss(taught.selector().select([Budget(cost, share * cost.full)]))
        beaten += [loss(net) < value for net in every if share - WITHIN <= cost.of(net) / cost.full <= share]
    assert len(beaten) > 100 and np.mean(beaten) < 0.03  # a budget between two bins may miss the best


def test_a_network_that_few_samples_rank_second_can_be_chosen():
    """Few samples rank the best network of a cost second; evaluation on all samples corrects it."""
    choices = family(2)
    cost, loss = latency(choices), true_loss(choices)
    taught = learner(choices, [cost], max_steps=20, kind=StraightThroughLearner)
    train(choices, taught, 0, 5)
    every = [choices.network(row) for row in itertools.product(*(range(len(sizes)) for sizes in choices.sizes))]
    limit = 0.7 * cost.full
    near = sorted((net for net in every if limit - WITHIN * cost.full <= cost.of(net) <= limit), key=loss)
    best, second = near[:2]

    def evaluate(networks, samples: int) -> list[float]:
        swapped = {best: loss(second), second: loss(best)} if samples < 64 else {}
        return [swapped.get(net, loss(net)) for net in networks]

    losses = evaluate_candidates(taught, evaluate, 64)
    assert loss(best) < loss(second) and {best, second} <= losses.keys()


@pytest.mark.parametrize("uniform", [False, True])
def test_over_all_axes_every_size_is_tried(uniform):
    taught = gumbel.learner(uniform)
    cost, axes = taught.costs[0], taught.choices
    tried: list[set[SubNetwork]] = []

    def evaluate(networks, samples: int) -> list[float]:
        tried.append(set(networks))
        return [gumbel.loss(axes, net) for net in networks]

    losses = evaluate_candidates(taught, evaluate, 8)
    sizes = {(net.hidden_size, sum(layer.executed for layer in net.layers)) for net in tried[0]}
    assert sizes == set(itertools.product(axes.space.hidden_size, axes.space.depth))
    if uniform:
        assert tried[0] == set(Uniform(Choices(axes.model, axes.space)).networks())
    budgets = [[Budget(cost, share * cost.full)] for share in np.linspace(0.3, 1, 30)]
    before = [taught.selector().select(budget) for budget in budgets]
    taught.info = replace(taught.info, evaluated=tuple((tuple(axes.indices(net)), value) for net, value in losses.items()))
    after = [taught.selector().select(budget) for budget in budgets]
    assert [cost.of(net) for net in after] == sorted(cost.of(net) for net in after)
    old, new = (np.mean([gumbel.loss(axes, net) for net in found]) for found in (before, after))
    assert new < old  # better than the proposal of an untrained router


@pytest.mark.parametrize("uniform", [False, True])
def test_a_network_worse_than_a_cheaper_one_is_no_answer(uniform):
    """Networks of half the channels lose to cheaper ones of all channels: larger budgets keep the cheaper network."""
    taught = gumbel.learner(uniform)
    cost, axes = taught.costs[0], taught.choices
    every: dict[SubNetwork, float] = {}

    def evaluate(networks, samples: int) -> list[float]:
        found = [2 + 0.3 * (net.hidden_size < axes.space.hidden_size[-1]) + 0.1 * gumbel.loss(axes, net) for net in networks]
        every.update(zip(networks, found, strict=True))
        return found

    losses = evaluate_candidates(taught, evaluate, 8)
    taught.info = replace(taught.info, evaluated=tuple((tuple(axes.indices(net)), loss) for net, loss in losses.items()))
    shares = np.linspace(cost.smallest / cost.full, 1, 200)
    chosen = [taught.selector().select([Budget(cost, share * cost.full)]) for share in shares]
    assert all(losses[later] <= 1.005 * losses[net] for net, later in itertools.pairwise(chosen))
    spent = [cost.of(net) for net in chosen]
    assert spent == sorted(spent) and all(np.array(spent) <= shares * cost.full * (1 + 1e-9))
    assert chosen[-1] == SubNetwork.full(axes.model) and chosen[0] == axes.least(cost)
    ordered = sorted(every, key=cost.of)
    worse = [net for i, net in enumerate(ordered) if every[net] > 1.02 * min(every[other] for other in ordered[: i + 1])]
    assert len(worse) > 5 and not losses.keys() & set(worse)


def test_the_full_model_stays_though_a_cheaper_network_is_better():
    choices = family(2)
    cost, full = latency(choices), SubNetwork.full(choices.model)
    less, more = sorted((choices.replaced(full, block, 0) for block in (0, 1)), key=cost.of)
    kept = candidates._without_worse(cost, {full: 2.2, more: 2.5, choices.least(cost): 3.0, less: 2.0})
    assert list(kept) == [choices.least(cost), less, full]
