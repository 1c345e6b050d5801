"""Adaptive routers learn from the gradients of masks and from the price of eq. 8. The loss of every level is known."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.adaptive.learner import AdaptiveLearner
from flextron_mcore.adaptive.routers import AdaptiveRouters
from flextron_mcore.adaptive.routing import Trace
from flextron_mcore.adaptive.store import AdaptiveInfo
from flextron_mcore.adaptive.usage import TokenCost
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.settings.sections import AdaptiveSettings
from tests.routing_toy import family, latency


def learned(
    parts: list[list[float]],
    level: int,
    target: float,
    weight: float = 0.0,
    overhead: tuple[float, ...] = (0.0,) * 3,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Levels [blocks, S] that routers choose for S tokens after training.

    Args:
        parts: [S][K], change of a token's loss by each part of a block.
        level: the level at which every token is computed during training.
        target: share of the full model's cost that the constraint allows.
        weight: weight of the constraint.
        overhead: costs of OVERHEADS in every block, as shares of the full model's cost.
        start: logits [K] that routers start from; None: zeros.
    """
    learner = learner_of(len(parts), weight, overhead)
    choices, routers = learner.choices, learner.routers
    hidden = torch.randn(len(parts), 1, choices.model.hidden_size)
    levels = torch.full((len(parts), 1), level)
    for step in range(60):
        (routing,) = learner.networks(step)
        routing.target_C, routing.start_NK = torch.tensor([target]), torch.zeros(choices.count, 4)
        if start is not None:
            routing.start_NK = start.expand(choices.count, 4)
        for block in range(choices.count):
            mask = torch.ones(len(parts), 1, 4, requires_grad=True)
            mask.grad = torch.tensor(parts)[:, None].clone()
            routing.traces.append(Trace(block, 0, hidden, levels, torch.ones_like(levels, dtype=torch.bool), mask))
        learner.learn(step, [3.0, 3.5])
    logits = [routers(block, hidden, routing.target_C, routing.start_NK)[:, 0] for block in range(choices.count)]
    return torch.stack(logits).argmax(-1)


def learner_of(tokens: int, weight: float, overhead: tuple[float, ...]) -> AdaptiveLearner:
    torch.manual_seed(0)
    choices = family(1)
    cost = latency(choices)
    overhead = tuple(value * cost.full for value in overhead)
    spent = TokenCost(cost, {axis: overhead for axis in cost.candidates}, tokens)
    info = AdaptiveInfo(("latency",), ((cost.smallest / cost.full, 1.0),), 8, {})
    routers = AdaptiveRouters(choices, 1, 8, StaticRouters(choices, 1, 8))
    settings = AdaptiveSettings(lr=0.05, constraint_weight=weight)
    return AdaptiveLearner(choices, [cost], info, settings, 1, 0, 100, routers, False, {"full": [spent]})


def spent_by_halves(learner: AdaptiveLearner) -> float:
    """Share of the full model's cost that a step counts with 4 of 8 tokens at the smallest level and 4 at the largest."""
    (routing,) = learner.networks(0)
    levels = torch.tensor([[0], [3]] * 4)
    for block in range(learner.choices.count):
        mask = torch.ones(8, 1, 4, requires_grad=True)
        mask.grad = torch.zeros(8, 1, 4)
        hidden = torch.randn(8, 1, learner.choices.model.hidden_size)
        routing.traces.append(Trace(block, 0, hidden, levels, torch.ones_like(levels, dtype=torch.bool), mask))
    return learner.learn(0, [3.0, 3.5])["costs"][0][0]


def test_a_token_learns_which_level_serves_it():
    """A level computes all parts of a block up to its own. Token 0 gains by part 1 and loses by part 2; token 1 gains by none."""
    for chosen in learned([[0.0, -9.0, 8.0, 0.0], [0.0, 5.0, 0.0, -1.0]], level=3, target=0.5):
        assert chosen.tolist() == [1, 0]


@pytest.mark.parametrize("level, target, wanted", [(3, 0.3, 0), (0, 0.7, 3)])
def test_the_price_pulls_to_the_budget(level, target, wanted):
    assert (learned([[0.0] * 4] * 3, level, target, weight=16.0) == wanted).all()


@pytest.mark.parametrize("overhead, wanted", [((0, 0, 0), {0, 3}), ((12, 0, 0), {0}), ((0, 12, 0), {0}), ((0, 0, 40), {0})])
def test_tokens_differ_only_where_the_gain_exceeds_the_overhead(overhead, wanted):
    """One token of eight gains by the largest level. It gets it, unless the overhead of a second level is more than the gain."""
    parts = [[0.0, -0.4, -0.4, -0.4], *[[0.0] * 4] * 7]
    chosen = learned(parts, level=0, target=-0.1, weight=0.5, overhead=overhead, start=torch.tensor([3.0, 0, 0, 0]))
    assert all(set(levels.tolist()) == wanted for levels in chosen), chosen


def test_spent_cost_has_the_routing_overhead():
    """A further level in a block adds 0.3 of the full model's cost."""
    spent = [spent_by_halves(learner_of(8, 0.5, overhead)) for overhead in ((0, 0, 0), (0, 0.3, 0))]
    assert spent[1] - spent[0] == pytest.approx(2 * 0.3 * (2 * 0.5 * 1.05 / 0.55 - 1), rel=1e-4)
