"""Constraint loss (Flextron, eq. 8), and the targets that routers are trained for.

A target is a budget in the routers' unit. Costs s_c and targets t_c are 0 at the smallest network's cost and 1 at the full
model's.

Shape suffixes: T targets, C constrained costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flextron_mcore.cost import Cost
from flextron_mcore.selection.router import target_of


@dataclass(frozen=True)
class Constraint:
    """Constraint loss of a network whose costs are s_c, for the targets t_c (Flextron, eq. 8, and a second term).

        loss = sum_c max(s_c - t_c, 0) + [step >= two_sided_from] max(min_c (t_c - s_c), 0)

    s_c and t_c are without unit: each cost c (latency, parameters, memory) is scaled to 0 for the smallest network and 1 for the
    full model. The second term penalises a network that uses none of its budgets fully. It starts late: early in training it
    would enlarge networks before the language loss tells where to spend.

    Attributes:
        two_sided_from: first step with the second term.
    """

    two_sided_from: float = 0.0

    def loss(self, over: Tensor, step: int, dim: int) -> Tensor:
        """Constraint loss of each network, with the dimension of the costs reduced: [..., C] -> [...].

        Args:
            over: s_c - t_c, cost minus target of each cost c, scaled to 0 for the smallest network and 1 for the full model.
            step: number of the step, from 0.
            dim: dimension of the costs in `over`.
        """
        above = over.clamp_min(0).sum(dim)
        return above if step < self.two_sided_from else above + (-over.amax(dim)).clamp_min(0)

    def slope(self, over_C: Tensor, step: int) -> Tensor:
        """Derivative [C] of `loss` with respect to each cost s_c; 0 for a cost equal to its target.

        Args:
            over_C: s_c - t_c, cost minus target of each cost c, scaled to 0 for the smallest network and 1 for the full model.
            step: number of the step, from 0.
        """
        counted_C = over_C > 0
        if step >= self.two_sided_from:
            counted_C = counted_C | (over_C == over_C.max())
        return torch.where(counted_C, over_C.sign(), 0.0)


class Targets:
    """Ranges of budgets, from which targets for routers are drawn.

    A target is a budget scaled to 0 at the smallest network's cost and 1 at the full model's.

    Args:
        costs: costs that budgets limit.
        ranges: (least, largest) budget of each cost, as shares of the full model's cost.

    Attributes:
        spans: full model's cost minus the smallest network's, in each cost's unit; 1 if they are equal.
        low_C, high_C: least and largest target of each cost.
    """

    def __init__(self, costs: Sequence[Cost], ranges: Sequence[tuple[float, float]]) -> None:
        self.spans = [cost.full - cost.smallest or 1.0 for cost in costs]
        bounds = [[target_of(cost, share * cost.full) for share in pair] for cost, pair in zip(costs, ranges, strict=True)]
        self.low_C, self.high_C = torch.tensor(bounds, dtype=torch.float32).T
        self._ends_C2 = torch.tensor([[cost.smallest / cost.full, 1.0] for cost in costs])

    def draw(self, count: int, generator: torch.Generator, power: float = 1.0) -> Tensor:
        """Draw random targets [T, C]. Each cost's targets are stratified: one from each of T equally likely parts of its range.

        Args:
            count: number T of targets.
            generator: source of random numbers.
            power: 1 for a uniform density; larger values draw more targets near the top of the range.
        """
        columns = []
        for low, high in zip(self.low_C, self.high_C, strict=True):
            part = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
            columns.append(high - (high - low) * (1 - part / count) ** power)
        return torch.stack(columns, -1)

    def shares(self, targets_TC: Tensor) -> list[list[float]]:
        """Convert targets [T, C] into budgets as shares of the full model's costs: T lists of C numbers."""
        low_C, high_C = self._ends_C2.to(targets_TC.device).T
        return (low_C + targets_TC * (high_C - low_C)).tolist()
