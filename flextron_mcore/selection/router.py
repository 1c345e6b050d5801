"""Selector of trained routers: the sub-network that they choose for a budget.

The routers' argmax (Flextron, eq. 9) does not meet a budget exactly, because the constraint of eq. 8 is soft and choices are
discrete. So costs are divided into narrow bins. Each bin has one network: the likeliest by the routers at this cost, or if losses
of candidates were evaluated (training/candidates.py), the one of least loss. A budget gets the best network of the bins just
below it, by a score that adds a bonus for using more of the budget. A bin's network and score do not depend on the budget, so a
larger budget never gets a cheaper network. No surrogate is needed, so the selector also works after joint tuning.

Shape suffixes: C costs that the routers were trained for, N choices, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget, Cost
from flextron_mcore.selection.knapsack import Limit, cheapest, every_size
from flextron_mcore.space import SubNetwork

BIN = 0.0025  # width of a cost bin, as a share of the full model's cost
# Share of the full model's cost that a network may leave unused of a budget, if any network is that near to it. With hidden size
# and depth as choices (WITHIN_AXES) good networks lie further apart.
WITHIN, WITHIN_AXES = 0.01, 0.019
# Bonus for using the budget: log-probability that the full model's cost adds to a network's score.
WORTH = 150.0
_Found = tuple[float, float, SubNetwork]  # score, cost, network


@dataclass(frozen=True)
class RouterSelector:
    """Selector of trained routers: chooses a sub-network for a budget by the routers' probabilities or evaluated losses.

    For a budget of a cost that the routers were not trained for, it uses the target whose likeliest network comes nearest to the
    budget.

    Attributes:
        choices: choices that the routers make.
        costs: {name: cost} that the routers were trained for, in the order of training.
        log_p: function from targets [C] to log-probabilities [N, K]. A target is a budget scaled to 0 at the smallest network's
            cost and 1 at the full model's.
        ranges: {name of a cost: (least, largest) budget of the training, as shares of the full model's cost}.
        evaluated: {network: loss in nats per token} of evaluated networks, among which a budget of the first cost gets its own.
    """

    choices: Choices
    costs: Mapping[str, Cost]
    log_p: Callable[[Sequence[float]], np.ndarray]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    evaluated: Mapping[SubNetwork, float] = field(default_factory=dict)
    _bins: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def within(self) -> float:
        """Share of the full model's cost that a network may leave unused of its budget, if some network is that near."""
        return WITHIN_AXES if self.choices.all_axes else WITHIN

    def select(self, budgets: Sequence[Budget]) -> SubNetwork:
        """Choose a network that exceeds no budget. Raises FlextronError if no network meets all budgets together.

        The network leaves at most `within` of one of the budgets unused, if any network does. For a single budget the choice is
        monotone: a larger budget never gets a cheaper network.
        """
        found = [pick for i in range(len(budgets)) if (pick := self._near(budgets, i))]
        if not found:  # each budget alone has near networks, but none of them meets all budgets
            net = self._largest(budgets)
            if net is None:
                raise FlextronError(f"no network keeps to {' and '.join(map(str, budgets))} together: raise one of the budgets")
            return net
        return max(found, key=lambda pick: pick[:2])[-1]

    def _near(self, budgets: Sequence[Budget], which: int) -> _Found | None:
        """Best network that leaves at most `within` of the budget budgets[which] unused, as (score, cost, network).

        If no network is that near: for a single budget the one of the nearest bin below it; for several budgets it may be None.

        Args:
            budgets: budgets that the network must meet together.
            which: index of the budget that it is to use.
        """
        cost, limit = budgets[which].cost, budgets[which].limit * (1 + 1e-12)
        others = [budget for i, budget in enumerate(budgets) if i != which]
        width = BIN * cost.full
        top = min(max(int(np.floor((limit - cost.smallest) / width)), 0), self._last_bin(cost))
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
        """(score, cost, network) of every bin of a cost, cheapest first; None for an empty bin. `select` chooses among them.

        A bin is a range of the cost as wide as BIN times the full model's cost; its network is the best in this range.
        """
        width = BIN * cost.full
        bounds = [min(cost.smallest + (number + 1) * width, cost.full) for number in range(self._last_bin(cost) + 1)]
        return [self._bin(cost, [], high - width, high) for high in bounds]

    def proposals(self, cost: Cost) -> list[SubNetwork]:
        """Networks that the routers find likeliest over the whole range of a cost, for candidate evaluation.

        The range is divided into bins of BIN times the full model's cost, and each bin gives its likeliest network. If hidden
        size and depth are choices too, it is divided into windows of WITHIN times the full model's cost, and each window gives
        the likeliest network of every hidden size and depth; the smallest and the full network are added.
        """
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
        """Network within all budgets that uses most of them; None if there is none."""
        limits: list[Limit] = [(budget.cost, 0.0, budget.limit) for budget in budgets]
        spent_NK = sum(self.choices.costs_NK(budget.cost) / budget.cost.full for budget in budgets)
        found = every_size(self.choices, -spent_NK, limits)
        return max(found, key=lambda net: sum(budget.cost.of(net) / budget.cost.full for budget in budgets), default=None)

    @staticmethod
    def _last_bin(cost: Cost) -> int:
        """Index of the bin that contains the full model; the smallest network is in bin 0."""
        return int(np.ceil((cost.full - cost.smallest) / (BIN * cost.full) - 1e-9))

    def _bin(self, cost: Cost, others: Sequence[Budget], low: float, high: float) -> _Found | None:
        """Best network that costs between `low` and `high` and meets the budgets `others`, as (score, cost, network).

        The score of an evaluated network is minus its loss, else that of `_score`. None if there is no such network. Bounds are
        in the cost's unit.
        """
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
        """Negative log-probability of each candidate for these budgets [N, K]."""
        log_p_NK = self.log_p(self._targets(budgets))
        if self.choices.all_axes:  # relative to the likeliest candidate: a skipped layer has no term, which must not look likely
            log_p_NK = log_p_NK - log_p_NK.max(-1, keepdims=True)
        return -np.where(self.choices.exists_NK, log_p_NK, 0.0)

    def untrained(self, budget: Budget) -> tuple[float, float] | None:
        """(least, largest) budget of the training, in shares of the full model's cost, if `budget` is outside; else None."""
        low, high = self.ranges.get(budget.cost.name, (0.0, 1.0))
        return None if low - 1e-9 <= budget.limit / budget.cost.full <= high + 1e-9 else (low, high)

    def argmax(self, targets: Sequence[float]) -> SubNetwork:
        """Network with the likeliest candidate of every choice, argmax(R_i(T)) (Flextron, eq. 9).

        targets: target T of each cost, 0 (smallest network) to 1 (full model).
        """
        return self.choices.network(self.log_p(targets).argmax(-1).tolist())

    def _targets(self, budgets: Sequence[Budget]) -> list[float]:
        """Targets [C] of the routers for some budgets: of each trained cost its budget's, 1 (full model) without one.

        For budgets of other costs than the trained ones: equal targets whose likeliest network comes nearest to the first budget.
        """
        given = {budget.cost.name: target_of(budget.cost, budget.limit) for budget in budgets}
        if given.keys() & self.costs.keys():
            return [given.get(name, 1.0) for name in self.costs]
        first = budgets[0]
        if "scan" not in self._bins:
            tried = [[t] * len(self.costs) for t in np.linspace(0, 1, 101)]
            self._bins["scan"] = [(targets, self.argmax(targets)) for targets in tried]
        return min(self._bins["scan"], key=lambda pair: abs(first.cost.of(pair[1]) - first.limit))[0]

    def _score(self, values_NK: np.ndarray, net: SubNetwork, cost: Cost) -> float:
        """Score of a network: its log-probability, plus WORTH times its cost as a share of the full model's cost.

        Args:
            values_NK: negative log-probability of each candidate.
            net: the network.
            cost: cost that counts.
        """
        return WORTH * cost.of(net) / cost.full - self.choices.total(values_NK, net)


def target_of(cost: Cost, value: float) -> float:
    """Convert a cost or budget, in the cost's unit, to a target: 0 at the smallest network's cost, 1 at the full model's."""
    return (value - cost.smallest) / (cost.full - cost.smallest) if cost.full > cost.smallest else 1.0
