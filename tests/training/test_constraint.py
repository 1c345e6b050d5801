"""Constraint (Flextron, eq. 8): cost above the target is penalised, and late in training cost below it, too (two-sided)."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.training.constraint import Constraint, Targets
from tests.routing_toy import family, latency

# {name: (costs minus their targets, one-sided loss, two-sided loss)}
CASES = {
    "above": ([0.2], 0.2, 0.2),
    "below": ([-0.3], 0.0, 0.3),
    "on it": ([0.0], 0.0, 0.0),
    "one of two above": ([0.2, -0.3], 0.2, 0.2),
    "both above": ([0.2, 0.1], 0.3, 0.3),
    "both below": ([-0.2, -0.3], 0.0, 0.2),  # the cost nearest to its target counts
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_its_slope(name):
    over, early, late = CASES[name]
    constraint = Constraint(two_sided_from=10)
    for step, expected in ((9, early), (10, late)):
        over_C = torch.tensor(over, requires_grad=True)
        loss = constraint.loss(over_C, step, dim=0)
        assert loss.item() == pytest.approx(expected)
        if name != "on it":  # at the target the loss has a kink
            (gradient_C,) = torch.autograd.grad(loss, over_C)
            assert constraint.slope(over_C.detach(), step).equal(gradient_C)
    assert not constraint.slope(torch.zeros(2), 10).any()


def test_targets_lie_in_their_range_and_shares_are_of_the_full_model():
    choices = family(2)
    cost = latency(choices)
    targets = Targets([cost], [(0.8, 0.9)])
    drawn_TC = targets.draw(5, torch.Generator().manual_seed(0))
    shares = torch.tensor(targets.shares(drawn_TC))[:, 0]
    assert torch.histc(shares, 5, 0.8, 0.9).tolist() == [1] * 5  # stratified: one target in each fifth of the range
    assert targets.shares(torch.tensor([[0.0], [1.0]])) == [[pytest.approx(cost.smallest / cost.full)], [1.0]]
