"""Constraint loss (Flextron, eq. 8), and the targets that routers are trained for.

Costs s_c and targets t_c are shares of the span from the smallest network's cost (0) to the full model's (1).

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
        """Constraint loss (Flextron, eq. 8), with the dimension of the costs reduced: [..., C] -> [...].

        Args:
            over: s_c - t_c, cost minus target of each cost c, scaled to 0 for the smallest network and 1 for the full model.
            step: number of the step.
            dim: dimension of the costs in `over`.
        """
        above = over.clamp_min(0).sum(dim)
        return above if step < self.two_sided_from else above + (-over.amax(dim)).clamp_min(0)

    def slope(self, over_C: Tensor, step: int) -> Tensor:
        """Derivative [C] of `loss` with respect to each cost s_c; 0 for a cost equal to its target.

        Args:
            over_C: s_c - t_c, cost minus target of each cost c, scaled to 0 for the smallest network and 1 for the full model.
            step: number of the step.
        """
        counted_C = over_C > 0
        if step >= self.two_sided_from:
            counted_C = counted_C | (over_C == over_C.max())
        return torch.where(counted_C, over_C.sign(), 0.0)


class Targets:
    """Ranges of budgets, from which targets for routers are drawn.

    A target is 0 for the smallest network's cost and 1 for the full model's.

    Args:
        costs: costs with a target.
        ranges: (least, largest) budget of each cost, as shares of the full model's cost.
    """

    def __init__(self, costs: Sequence[Cost], ranges: Sequence[tuple[float, float]]) -> None:
        self.spans = [cost.full - cost.smallest or 1.0 for cost in costs]
        bounds = [[target_of(cost, share * cost.full) for share in pair] for cost, pair in zip(costs, ranges, strict=True)]
        self.low_C, self.high_C = torch.tensor(bounds, dtype=torch.float32).T
        self._ends_C2 = torch.tensor([[cost.smallest / cost.full, 1.0] for cost in costs])

    def draw(self, count: int, generator: torch.Generator, power: float = 1.0) -> Tensor:
        """Draw random targets [T, C], stratified over each cost's range: one from each of T equally likely parts of the range.

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
        """Convert targets [T, C], 0 (smallest network) to 1 (full model), into shares of the full model's costs, T lists of C.

        Costs on the same scale are converted in the same way.
        """
        low_C, high_C = self._ends_C2.to(targets_TC.device).T
        return (low_C + targets_TC * (high_C - low_C)).tolist()
