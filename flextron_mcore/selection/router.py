"""Selector of trained routers: the network that they choose for a budget.

The routers' argmax (eq. 9) is not exactly on the budget: the constraint of eq. 8 is a soft one, and a choice is discrete. So
costs are divided into narrow bins, and in each the network is found that the routers think likeliest at that cost. A budget
takes the likeliest of those in the bins just below it, where using more of the budget counts for something too. Where the argmax
is clear and on the budget, it is what is taken. No surrogate is needed, so this serves after joint tuning too. Where losses of
networks were evaluated (training/candidates.py), a bin's is the best of these. Since a bin's network and its score do not depend
on the budget, a larger budget never gets a cheaper network.

Shape suffixes: C costs that the routers were trained for, N choices, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flextron_mcore.choices import Choices
from flextron_mcore.cost import Budget, Cost
from flextron_mcore.selection.knapsack import Limit, cheapest, every_size
from flextron_mcore.space import SubNetwork

# Shares of the full model's cost: the width of a cost bin, and how much of a budget may stay unused where networks are that near.
BIN = 0.0025
WITHIN, WITHIN_AXES = 0.01, 0.019  # over all axes the good networks lie less densely
# How much likelier a network must be to be taken before one that uses more of the budget: log-probability per full cost.
WORTH = 150.0
_Found = tuple[float, float, SubNetwork]  # score, cost, network


@dataclass(frozen=True)
class RouterSelector:
    """Selector of trained routers.

    log_p: log-probabilities [N, K] for targets [C], each 0 for the smallest network's and 1 for the full model's cost of
    `costs`, by name. ranges: the shares of the full model's cost that they were trained for. A budget of a cost that is not among
    `costs` is served by the target whose argmax comes nearest to it. evaluated: losses of networks, for budgets of the first
    cost.
    """

    choices: Choices
    costs: Mapping[str, Cost]
    log_p: Callable[[Sequence[float]], np.ndarray]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    evaluated: Mapping[SubNetwork, float] = field(default_factory=dict)
    _bins: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def within(self) -> float:
        """Share of the full model's cost that may stay unused where networks are that near."""
        return WITHIN_AXES if self.choices.all_axes else WITHIN

    def select(self, budgets: Sequence[Budget]) -> SubNetwork:
        """The network for `budgets`, of which none is exceeded.

        At most `within` of the full cost is left of one of them, where any network is that near. With a single budget: monotone.
        """
        found = [pick for i in range(len(budgets)) if (pick := self._near(budgets, i))]
        if not found:  # only together they hold nothing that is near to any
            return self._largest(budgets)
        return max(found, key=lambda pick: pick[:2])[-1]

    def _near(self, budgets: Sequence[Budget], which: int) -> _Found | None:
        """The likeliest network that uses one of the budgets; for a single budget else the nearest below it."""
        cost, limit = budgets[which].cost, budgets[which].limit * (1 + 1e-12)
        others = [budget for i, budget in enumerate(budgets) if i != which]
        width = BIN * cost.full
        top = min(max(int(np.floor((limit - cost.smallest) / width)), 0), self._last(cost))
        inside: list[_Found] = []
        for number in range(top, -1, -1):
            high = min(cost.smallest + (number + 1) * width, cost.full)
            if high < limit - self.within * cost.full and (inside or others):
                break
            found = self._bin(cost, others, high - width, high)
            if found and found[1] <= limit:
                inside.append(found)
                if found[1] < limit - self.within * cost.full and len(inside) == 1:
                    break
        if not (inside or others):
            return 0.0, cost.smallest, self.choices.least(cost)
        near = [found for found in inside if found[1] >= limit - self.within * cost.full]
        return max(near or inside, key=lambda found: found[:2], default=None)

    def bins(self, cost: Cost) -> list[_Found | None]:
        """(score, cost, network) of every bin of a cost, cheapest first: what answers each single budget of it."""
        width = BIN * cost.full
        bounds = [min(cost.smallest + (number + 1) * width, cost.full) for number in range(self._last(cost) + 1)]
        return [self._bin(cost, [], high - width, high) for high in bounds]

    def proposals(self, cost: Cost) -> list[SubNetwork]:
        """Likeliest networks over the whole range of a cost: one a bin, or over all axes one a size in windows of WITHIN."""
        if not self.choices.all_axes:
            return [found[-1] for found in self.bins(cost) if found]
        found: list[SubNetwork] = [self.choices.least(cost), SubNetwork.full(self.choices.model)]
        high = cost.full
        while high > cost.smallest:
            limits: list[Limit] = [(cost, high - WITHIN * cost.full, high)]
            found += every_size(self.choices, self._values([Budget(cost, high)]), limits)
            high -= WITHIN * cost.full
        return found

    def _largest(self, budgets: Sequence[Budget]) -> SubNetwork | None:
        """The network that uses most of budgets that hold together."""
        limits: list[Limit] = [(budget.cost, 0.0, budget.limit) for budget in budgets]
        spent_NK = sum(self.choices.costs_NK(budget.cost) / budget.cost.full for budget in budgets)
        found = every_size(self.choices, -spent_NK, limits)
        return max(found, key=lambda net: sum(budget.cost.of(net) / budget.cost.full for budget in budgets), default=None)

    @staticmethod
    def _last(cost: Cost) -> int:
        """The number of the bin that holds the full model."""
        return int(np.ceil((cost.full - cost.smallest) / (BIN * cost.full) - 1e-9))

    def _bin(self, cost: Cost, others: Sequence[Budget], low: float, high: float) -> _Found | None:
        """The likeliest network that costs between `low` and `high`."""
        key = (cost.name, tuple((other.cost.name, other.limit) for other in others), high)
        if self.evaluated and not others and cost.name == next(iter(self.costs)):
            inside = [(-loss, cost.of(net), net) for net, loss in self.evaluated.items()]
            inside = [found for found in inside if low <= found[1] <= high * (1 + 1e-12)]
            return max(inside, key=lambda found: found[:2], default=None)
        if key not in self._bins:
            values_NK = self._values([Budget(cost, high), *others])
            limits: list[Limit] = [(cost, low, high), *((other.cost, 0.0, other.limit) for other in others)]
            net = cheapest(self.choices, values_NK, limits)
            self._bins[key] = (self._score(values_NK, net, cost), cost.of(net), net) if net else None
        return self._bins[key]

    def _values(self, budgets: Sequence[Budget]) -> np.ndarray:
        """How unlikely the routers think each candidate for these budgets."""
        log_p_NK = self.log_p(self._targets(budgets))
        if self.choices.all_axes:  # layers may be skipped: what is unlikely counts, not how many choices there are
            log_p_NK = log_p_NK - log_p_NK.max(-1, keepdims=True)
        return -np.where(self.choices.exists_NK, log_p_NK, 0.0)

    def untrained(self, budget: Budget) -> tuple[float, float] | None:
        """The range of shares that the routers were trained for, if `budget` is outside of it."""
        low, high = self.ranges.get(budget.cost.name, (0.0, 1.0))
        return None if low - 1e-9 <= budget.limit / budget.cost.full <= high + 1e-9 else (low, high)

    def argmax(self, targets: Sequence[float]) -> SubNetwork:
        """The routers' own choice (eq. 9) for targets between 0 and 1."""
        return self.choices.network(self.log_p(targets).argmax(-1).tolist())

    def _targets(self, budgets: Sequence[Budget]) -> list[float]:
        given = {budget.cost.name: target_of(budget.cost, budget.limit) for budget in budgets}
        if given.keys() & self.costs.keys():
            return [given.get(name, 1.0) for name in self.costs]
        first = budgets[0]
        if "scan" not in self._bins:
            tried = [[t] * len(self.costs) for t in np.linspace(0, 1, 101)]
            self._bins["scan"] = [(targets, self.argmax(targets)) for targets in tried]
        return min(self._bins["scan"], key=lambda pair: abs(first.cost.of(pair[1]) - first.limit))[0]

    def _score(self, values_NK: np.ndarray, net: SubNetwork, cost: Cost) -> float:
        return WORTH * cost.of(net) / cost.full - self.choices.total(values_NK, net)


def target_of(cost: Cost, value: float) -> float:
    """A cost's value as the routers see it: 0 for the smallest network's, 1 for the full model's."""
    return (value - cost.smallest) / (cost.full - cost.smallest) if cost.full > cost.smallest else 1.0
