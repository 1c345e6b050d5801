"""Static routers learn from a made-up loss, in place of a language model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flextron_mcore.cost import Budget, memory_cost
from flextron_mcore.routers.store import RouterInfo
from flextron_mcore.selection.sampling import draw_near
from flextron_mcore.settings.sections import RouterSettings, SurrogateSettings
from flextron_mcore.space import SubNetwork
from flextron_mcore.training.router import RouterTraining
from flextron_mcore.training.static import StaticLearner, StraightThroughLearner, SurrogateLearner
from tests.routing_toy import family, latency, true_loss

STEPS = 250
MEMORY = {"dtype": "bf16", "batch_size": 1, "length": 24}


def learner(choices, costs, max_steps=STEPS, seed=0, kind=SurrogateLearner) -> StaticLearner:
    ranges = tuple((cost.smallest / cost.full, 1.0) for cost in costs)
    info = RouterInfo(tuple(cost.name for cost in costs), ranges, 32, MEMORY)
    training = RouterTraining(choices, costs, info, 4, seed, max_steps)
    if kind is StraightThroughLearner:
        return kind(training, RouterSettings())
    return SurrogateLearner(training, RouterSettings(), SurrogateSettings())


def train(choices, taught: StaticLearner, first: int, last: int, noise: float = 0.005, seed: int = 0) -> list[dict]:
    """Train on made-up losses and return the rows of the log. The full model's loss varies by batch; sub-networks' have noise."""
    loss, rows = true_loss(choices), []
    for step in range(first, last):
        generator = np.random.default_rng([seed, step])
        full = 3 + generator.normal()
        networks = taught.networks(step)
        losses = [full, *(full + loss(net) + noise * generator.normal() for net in networks)]
        gradients = []
        if isinstance(taught, StraightThroughLearner):
            sizes = torch.tensor([choices.indices(net) for net in networks]) + 1
            worth = [loss(choices.replaced(SubNetwork.full(choices.model), n, 0)) for n in range(choices.count)]
            gradients = [-torch.tensor(worth) * sizes]
        rows.append(taught.learn(step, losses, *gradients))
    return rows


@pytest.fixture(scope="module")
def trained():
    choices = family(4)
    taught = learner(choices, [latency(choices)])
    return choices, taught, train(choices, taught, 0, STEPS)


def test_the_three_phases(trained):
    """Fig. 12: first only the surrogate learns, and the constraint brings networks to their budgets; then routers follow it."""
    _, taught, rows = trained
    follows = [row["routers_follow_surrogate"] for row in rows]
    start = follows.index(True)
    assert 5 < start < STEPS // 2 and all(follows[-50:])
    assert all(row["surrogate_error"] >= taught.surrogate_settings.threshold for row in rows[5:start])
    assert rows[-1]["surrogate_error"] < 0.5 * taught.surrogate_settings.threshold
    early, late = (np.mean([row["surrogate_loss"] for row in part]) for part in (rows[:10], rows[-50:]))
    assert late < 0.1 * early


def test_budgets_and_quality(trained):
    """20 budgets that training never drew: kept, used, monotone; better than 95 % of random networks of the same cost."""
    choices, taught, _ = trained
    (cost,), selector, loss = taught.costs, taught.selector(), true_loss(choices)
    shares = np.linspace(cost.smallest / cost.full + 0.06, 0.95, 20)
    networks = [selector.select([Budget(cost, share * cost.full)]) for share in shares]
    spent = [cost.of(net) / cost.full for net in networks]
    assert spent == sorted(spent)
    assert all(share - 0.02 <= found <= share + 1e-9 for share, found in zip(shares, spent, strict=True))
    better = []
    for share, net in zip(shares, networks, strict=True):
        drawn = draw_near(choices, [Budget(cost, share * cost.full)], 100, seed=1)
        better.append(np.mean([loss(other) > loss(net) for other in drawn if other != net]))
    assert np.mean(better) > 0.97 and np.mean(np.array(better) >= 0.95) >= 0.8


def test_the_bare_argmax_follows_the_target(trained):
    choices, taught, _ = trained
    cost = taught.costs[0]
    gaps = [abs(cost.of(taught.argmax(share)) / cost.full - share) for share in np.linspace(0.55, 0.95, 9)]
    assert np.mean(gaps) < 0.05


def test_a_step_depends_on_the_seed_and_the_step_only(trained):
    choices, _, rows = trained
    cost = latency(choices)
    again = learner(choices, [cost])
    assert train(choices, again, 0, 5) == rows[:5]
    other = learner(choices, [cost], seed=1)
    assert train(choices, other, 0, 1) != rows[:1]


def test_continued_equals_uninterrupted(trained, tmp_path):
    choices, _, rows = trained
    half = learner(choices, [latency(choices)])
    train(choices, half, 0, 60)
    half.write(tmp_path)
    again = learner(choices, [latency(choices)])
    again.read(tmp_path)
    assert train(choices, again, 60, 75) == rows[60:75]


def test_targets_are_spread_over_the_range():
    choices = family(2)
    cost = latency(choices)
    memory = memory_cost(choices.model, choices.space, "bf16", 64, 24)
    info = RouterInfo(("latency", "memory"), ((0.8, 0.9), (0.7, 1.0)), 8, MEMORY)
    taught = SurrogateLearner(RouterTraining(choices, [cost, memory], info, 5, 0, 10), RouterSettings(), SurrogateSettings())
    for step in range(10):
        taught.networks(step)
        figures = taught.learn(step, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
        latencies, memories = np.array(figures["targets"]).T
        for found, low, high in ((latencies, 0.8, 0.9), (memories, 0.7, 1.0)):  # one in each fifth of sqrt(high - target)
            assert np.histogram(np.sqrt((high - found) / (high - low)), 5, (0, 1))[0].tolist() == [1] * 5
        assert np.array(figures["costs"]).shape == (5, 2)


def test_several_costs_together():
    choices = family(3)
    costs = [latency(choices), memory_cost(choices.model, choices.space, "bf16", 64, 24)]
    taught = learner(choices, costs)
    train(choices, taught, 0, STEPS)
    selector, loss = taught.selector(), true_loss(choices)
    budgets = [Budget(costs[0], 0.85 * costs[0].full), Budget(costs[1], 0.7 * costs[1].full)]
    net = selector.select(budgets)
    assert all(budget.allows(net) for budget in budgets)
    drawn = [other for seed in range(3) for other in draw_near(choices, budgets[::-1], 60, seed) if other != net]
    assert np.mean([loss(other) > loss(net) for other in drawn]) > 0.9


def test_straight_through_the_gates():
    """Without a surrogate, the gradients of gates alone teach routers which blocks matter."""
    choices = family(3)
    cost = latency(choices)
    taught = learner(choices, [cost], kind=StraightThroughLearner)
    rows = train(choices, taught, 0, STEPS)
    assert "surrogate_loss" not in rows[0] and rows[-1]["constraint_loss"] >= 0
    loss, full = true_loss(choices), SubNetwork.full(choices.model)
    worth = [loss(choices.replaced(full, n, 0)) for n in range(choices.count)]
    kept = np.mean([choices.indices(taught.choose(share)) for share in np.linspace(0.6, 0.9, 7)], 0)
    assert np.corrcoef(worth, kept)[0, 1] > 0.5
    assert all(cost.of(taught.choose(share)) <= share * cost.full for share in np.linspace(0.6, 0.9, 7))
