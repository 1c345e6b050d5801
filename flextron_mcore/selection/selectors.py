"""Selectors that need no training: baselines, and for users in a hurry. No torch import.

A selector is anything with `select(budgets) -> SubNetwork`, the network it thinks best within all of the budgets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flextron_mcore.axes import AXES
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget, show
from flextron_mcore.selection.knapsack import cheapest
from flextron_mcore.selection.sampling import draw_near
from flextron_mcore.space import SubNetwork, count_parameters


class Selector(Protocol):
    """Picks a network for budgets, of which all hold."""

    def select(self, budgets: Sequence[Budget]) -> SubNetwork:
        """Raises FlextronError where no network that it knows keeps to the budgets."""


@dataclass(frozen=True)
class Uniform:
    """The largest network with the same widths in every layer: the most balanced, and of those the one with most parameters."""

    choices: Choices

    def networks(self) -> list[SubNetwork]:
        """Every one that it knows."""
        space = self.choices.space
        return [space.uniform(self.choices.model, *sizes) for sizes in itertools.product(*space.sizes.values())]

    def select(self, budgets: Sequence[Budget]) -> SubNetwork:
        full = SubNetwork.full(self.choices.model)

        def balance(net: SubNetwork) -> float:
            parts = [(axis, (net.executed_layers[0], full.layers[0]) if axis.of_layer else (net, full)) for axis in AXES.values()]
            return min(axis.size(part) / axis.size(whole) for axis, (part, whole) in parts)

        return _largest("uniform", self.choices, self.networks(), budgets, balance)


@dataclass(frozen=True)
class MatFormer:
    """The largest network that has all heads, and the same MLP width in every layer (MatFormer, arXiv:2310.07707)."""

    choices: Choices

    def networks(self) -> list[SubNetwork]:
        """Every one that it knows."""
        space = self.choices.space
        return [space.uniform(self.choices.model, ffn_hidden_size=width) for width in space.ffn_hidden_size]

    def select(self, budgets: Sequence[Budget]) -> SubNetwork:
        return _largest("matformer", self.choices, self.networks(), budgets)


@dataclass(frozen=True)
class Random:
    """The best of `count` random networks that just keep to the budgets. losses: evaluates networks [nats per token]."""

    choices: Choices
    count: int
    seed: int
    losses: Callable[[Sequence[SubNetwork]], Sequence[float]]

    def select(self, budgets: Sequence[Budget]) -> SubNetwork:
        drawn = draw_near(self.choices, budgets, self.count, self.seed)
        losses = self.losses(drawn)
        return drawn[int(np.argmin(losses))]


@dataclass(frozen=True)
class Sensitivity:
    """The network whose blocks, each replaced alone in the full model, degrade its loss least together (fig. 6).

    degradation_NK: loss above the full model's of each candidate [nats per token]. Exact for any budgets.
    """

    choices: Choices
    degradation_NK: np.ndarray

    def select(self, budgets: Sequence[Budget]) -> SubNetwork:
        found = cheapest(self.choices, self.degradation_NK, [(b.cost, 0.0, b.limit) for b in budgets])
        if found is None:
            raise FlextronError(f"no network keeps to {' and '.join(map(str, budgets))} together")
        return found


def _largest(
    name: str,
    choices: Choices,
    networks: Iterable[SubNetwork],
    budgets: Sequence[Budget],
    first: Callable[[SubNetwork], float] = lambda net: 0.0,
) -> SubNetwork:
    """The network within `budgets` with most of `first`, and of those with most parameters."""
    networks = list(networks)
    fitting = [net for net in networks if all(budget.allows(net) for budget in budgets)]
    if not fitting:
        least = min(networks, key=lambda net: count_parameters(choices.model, net))
        costs = ", ".join(f"{show(b.cost.name, b.cost.of(least))} ({b.cost.of(least) / b.cost.full:.3f})" for b in budgets)
        raise FlextronError(
            f"selector={name}: none of its {len(networks)} networks keeps to {' and '.join(map(str, budgets))}: "
            f"the smallest has {costs}"
        )
    return max(fitting, key=lambda net: (first(net), count_parameters(choices.model, net)))
