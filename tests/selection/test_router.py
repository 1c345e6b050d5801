"""RouterSelector: from routers' probabilities to the network for a budget."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget, Cost, memory_cost, parameter_cost
from flextron_mcore.selection.knapsack import cheapest
from flextron_mcore.selection.router import BIN, WITHIN, RouterSelector, target_of
from flextron_mcore.space import SubNetwork
from tests.routing_toy import family, latency


def boltzmann(choices: Choices, cost: Cost, seed: int):
    """Log-probabilities by each block's loss, with noise that depends on the target: a stand-in for trained routers."""
    worth = np.random.default_rng(seed).uniform(0.5, 1.5, choices.count)

    def log_p(targets):
        noise = np.random.default_rng([seed, int(1e6 * targets[0])]).normal(scale=0.05, size=choices.exists_NK.shape)
        share = choices.costs_NK(cost) / cost.full
        logits = 30 * worth[:, None] * share - 60 * (1 - targets[0]) * share + noise
        logits = np.where(choices.exists_NK, logits, -np.inf)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return log_p


@pytest.mark.parametrize("layers, seed", [(4, 1), (5, 2)])
def test_budgets_are_used_never_exceeded_and_monotone(layers, seed):
    choices = family(layers)
    cost = latency(choices)
    selector = RouterSelector(choices, {"latency": cost}, boltzmann(choices, cost, seed))
    shares = np.sort(np.random.default_rng(seed).uniform(cost.smallest / cost.full, 1, 24))
    costs = []
    for share in shares:
        net = selector.select([Budget(cost, share * cost.full)])
        choices.space.check(choices.model, net)
        assert cost.of(net) <= share * cost.full * (1 + 1e-9)
        costs.append(cost.of(net) / cost.full)
    assert costs == sorted(costs)
    for share, spent in zip(shares, costs, strict=True):
        nearest = cheapest(choices, -choices.costs_NK(cost), [(cost, 0.0, share * cost.full)])
        assert share - spent <= max(WITHIN, share - cost.of(nearest) / cost.full) + BIN
    assert selector.select([Budget(cost, cost.full)]) == SubNetwork.full(choices.model)
    smallest = selector.select([Budget(cost, cost.smallest)])
    assert choices.indices(smallest) == [0] * choices.count
    # Answers do not depend on budgets that were asked before.
    again = RouterSelector(choices, {"latency": cost}, boltzmann(choices, cost, seed))
    assert again.select([Budget(cost, shares[12] * cost.full)]) == selector.select([Budget(cost, shares[12] * cost.full)])


def test_an_argmax_that_is_on_the_budget_is_taken():
    choices = family(4)
    cost = latency(choices)
    wanted = choices.network([2, 1, 3, 0, 1, 2, 2, 3])

    def log_p(targets):
        p = np.full(choices.exists_NK.shape, 0.01)
        p[np.arange(choices.count), choices.indices(wanted)] = 0.97
        return np.log(p)

    selector = RouterSelector(choices, {"latency": cost}, log_p)
    for more in (0.0, 0.004, 0.009):
        assert selector.select([Budget(cost, cost.of(wanted) + more * cost.full)]) == wanted
    assert selector.argmax([0.3]) == wanted


def test_several_budgets_and_costs_that_were_not_trained():
    choices = family(4)
    cost, parameters = latency(choices), parameter_cost(choices.model, choices.space)
    memory = memory_cost(choices.model, choices.space, "bf16", 64, 24)
    selector = RouterSelector(choices, {"latency": cost}, boltzmann(choices, cost, 0))
    previous = 0.0
    for share in np.linspace(0.6, 1, 6):
        net = selector.select([Budget(parameters, share * parameters.full)])
        assert previous <= parameters.of(net) <= share * parameters.full
        assert share < 0.62 or share > 0.95 or parameters.of(net) >= (share - WITHIN - BIN) * parameters.full
        previous = parameters.of(net)
        budgets = [Budget(cost, share * cost.full), Budget(memory, 0.75 * memory.full)]
        both = selector.select(budgets)
        assert all(budget.allows(both) for budget in budgets)
        assert cost.of(both) >= (share - 0.03) * cost.full or memory.of(both) >= 0.7 * memory.full


def test_budgets_that_no_network_meets_together_are_refused():
    """With made-up latencies, small candidates are slow: no network has both the smallest latency and the fewest parameters."""
    choices = family(2)
    parameters = parameter_cost(choices.model, choices.space)
    slow = replace(latency(choices), candidates={name: costs[::-1] for name, costs in latency(choices).candidates.items()})
    selector = RouterSelector(choices, {"latency": slow}, boltzmann(choices, slow, 0))
    budgets = [Budget(cost, cost.smallest * 1.001) for cost in (slow, parameters)]
    assert all(selector.select([budget]) for budget in budgets)
    with pytest.raises(FlextronError, match="no network keeps to latency <= .* and parameters <= .* together: raise one"):
        selector.select(budgets)


def test_a_target_is_a_share_between_the_smallest_and_the_full_cost():
    cost = latency(family(2))
    assert target_of(cost, cost.smallest) == 0 and target_of(cost, cost.full) == pytest.approx(1)
    fixed = family(2, heads=[1.0], ffn_hidden_size=[1.0])
    only = latency(fixed)
    assert target_of(only, only.full) == 1
    net = RouterSelector(fixed, {"latency": only}, lambda targets: np.zeros((4, 1))).select([Budget(only, only.full)])
    assert net == SubNetwork.full(fixed.model)


@pytest.mark.parametrize("uniform", [False, True])
def test_budgets_that_hold_nothing_near_together_are_used_as_far_as_they_go(uniform):
    """If every network within several budgets leaves much of them unused, the one that uses most is found. Over all axes."""
    choices = family(2, hidden_size=[8, 32], depth=[1, 2], heads=[0.5, 1.0], ffn_hidden_size=[0.5, 1.0])
    axes = Choices(choices.model, choices.space, all_axes=True, uniform=uniform)
    costs = [parameter_cost(axes.model, axes.space), memory_cost(axes.model, axes.space, "bf16", 64, 24)]
    every = {axes.network(row) for row in itertools.product(*(range(len(sizes)) for sizes in axes.sizes))}
    selector = RouterSelector(axes, {"parameters": costs[0]}, lambda targets: np.where(axes.exists_NK, 0.0, -np.inf))
    for shares in ((0.35, 0.6), (0.6, 0.4)):
        budgets = [Budget(cost, share * cost.full) for cost, share in zip(costs, shares, strict=True)]
        allowed = [net for net in every if all(budget.allows(net) for budget in budgets)]
        used = lambda net: sum(cost.of(net) / cost.full for cost in costs)  # noqa: E731
        assert used(selector._largest(budgets)) == pytest.approx(max(map(used, allowed)))
