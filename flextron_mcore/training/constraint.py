"""The constraint loss (Flextron, eq. 8), and the targets that it holds choices to.

Costs and targets are in shares of the span between the smallest network's cost (0) and the full model's (1).

Shape suffixes: T targets, C constrained costs, N decisions, K candidates.
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
    """Constraint loss of a choice with costs s_c for targets t_c (eq. 8).

        loss = sum_c max(0, s_c - t_c) + [two-sided] max(0, min_c (t_c - s_c))

    The second term holds a choice to its budget from below too: of several costs the one nearest to its target is to reach it.
    Early in training it would pull choices up before the language loss says where to spend.

    two_sided_from: the first step with the second term.
    """

    two_sided_from: float = 0.0

    def loss(self, over: Tensor, step: int, dim: int) -> Tensor:
        """Loss of costs above their targets, s_c - t_c along `dim`, which goes."""
        above = over.clamp_min(0).sum(dim)
        return above if step < self.two_sided_from else above + (-over.amax(dim)).clamp_min(0)

    def slope(self, over_C: Tensor, step: int) -> Tensor:
        """Derivative of `loss` by each cost: [C]; 0 for a cost that is exactly on its target."""
        counted_C = over_C > 0
        if step >= self.two_sided_from:
            counted_C = counted_C | (over_C == over_C.max())
        return torch.where(counted_C, over_C.sign(), 0.0)


class Targets:
    """Range of the targets that routers are trained for: those of `costs` between `ranges`, shares of the full model's costs."""

    def __init__(self, costs: Sequence[Cost], ranges: Sequence[tuple[float, float]]) -> None:
        self.spans = [cost.full - cost.smallest or 1.0 for cost in costs]
        bounds = [[target_of(cost, share * cost.full) for share in pair] for cost, pair in zip(costs, ranges, strict=True)]
        self.low_C, self.high_C = torch.tensor(bounds, dtype=torch.float32).T
        self._ends_C2 = torch.tensor([[cost.smallest / cost.full, 1.0] for cost in costs])

    def draw(self, count: int, generator: torch.Generator, power: float = 1.0) -> Tensor:
        """Targets [T, C], each cost's spread evenly over its range, or for a larger `power` more densely at its top."""
        columns = []
        for low, high in zip(self.low_C, self.high_C, strict=True):
            part = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
            columns.append(high - (high - low) * (1 - part / count) ** power)
        return torch.stack(columns, -1)

    def shares(self, targets_TC: Tensor) -> list[list[float]]:
        """Targets, or costs in their units, as shares of the full model's costs."""
        low_C, high_C = self._ends_C2.to(targets_TC.device).T
        return (low_C + targets_TC * (high_C - low_C)).tolist()
