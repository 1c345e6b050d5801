"""Losses that were measured decide what budgets get."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flextron_mcore.cost import Budget
from flextron_mcore.selection import routed
from flextron_mcore.selection.routed import WITHIN
from flextron_mcore.training import measured as module
from flextron_mcore.training.measured import measured
from tests.routing_toy import family, latency, true_loss
from tests.training.test_router import learner, train

CELL = 0.005  # half as many as there are, for time


@pytest.fixture(autouse=True)
def wide_cells(monkeypatch):
    for place in (routed, module):
        monkeypatch.setattr(place, "CELL", CELL)


def test_budgets_get_better_networks():
    """Routers that were trained briefly, on noisy losses; what is measured is the true loss, in the first round with noise."""
    blocks = family(4)
    cost, loss = latency(blocks), true_loss(blocks)
    taught = learner(blocks, [cost], max_steps=80)
    train(blocks, taught, 0, 80, noise=0.05)
    rounds: list[tuple[int, int]] = []

    def measure(networks, samples: int) -> list[float]:
        rounds.append((len(networks), samples))
        noise = np.random.default_rng(0).normal(scale=0.002 if samples < 32 else 0.0, size=len(networks))
        return [2 + loss(net) + more for net, more in zip(networks, noise, strict=True)]

    before = taught.selector()
    losses = measured(taught, measure, 32)
    assert [samples for _, samples in rounds] == [8, 32] and rounds[0][0] > 2 * rounds[1][0] > 0
    assert all(losses[net] == 2 + loss(net) for net in losses) and len(losses) == rounds[1][0]
    taught.info = replace(taught.info, measured=tuple((tuple(blocks.indices(net)), value) for net, value in losses.items()))
    after = taught.selector()
    shares = np.linspace(cost.smallest / cost.full + 0.02, 1, 40)
    gains, spent = [], []
    for share in shares:
        old, new = (selector.select([Budget(cost, share * cost.full)]) for selector in (before, after))
        assert new in losses and cost.of(new) <= share * cost.full * (1 + 1e-9)
        assert cost.of(new) >= cost.of(old) - (WITHIN + 2 * CELL) * cost.full
        gains.append(loss(old) - loss(new))
        spent.append(cost.of(new))
    assert spent == sorted(spent)
    # What the first round's noise, or a budget between two cells, may cost.
    assert np.mean(gains) > 0.003 and np.mean(np.array(gains) < -0.002) <= 0.05
    assert after.select([Budget(cost, cost.full)]) == before.select([Budget(cost, cost.full)])


def test_without_a_surrogate_the_likeliest_are_measured():
    blocks = family(2)
    cost = latency(blocks)
    taught = learner(blocks, [cost], max_steps=20, surrogate=False)
    train(blocks, taught, 0, 5)
    tried: list[int] = []

    def measure(networks, samples: int) -> list[float]:
        tried.append(len(networks))
        return [cost.full - cost.of(net) for net in networks]

    likeliest = {found[-1] for found in taught.selector().cells(cost) if found}
    losses = measured(taught, measure, 2)
    assert tried[0] == len(likeliest) and losses.keys() <= likeliest
