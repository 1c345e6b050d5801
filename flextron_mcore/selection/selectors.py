"""Selectors that need no trained routers, for baselines and for quick results. No torch import."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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
    """Interface of a selector, which chooses a sub-network for budgets."""

    def select(self, budgets: Sequence[Budget]) -> SubNetwork:
        """Choose a network within all budgets. Raises FlextronError if the selector finds none."""


@dataclass(frozen=True)
class Uniform:
    """Selector of networks with the same widths in every layer.

    Of the networks within the budgets it takes the most balanced one. The balance of a network is the least of its sizes, over
    all axes, as a share of the axis's full size; among equals the network with most parameters is taken.
    """

    choices: Choices

    def networks(self) -> list[SubNetwork]:
        """All networks with the same widths in every layer, from which the selector chooses."""
        space = self.choices.space
        return [space.uniform(self.choices.model, *sizes) for sizes in itertools.product(*space.sizes.values())]

    def rank(self, net: SubNetwork) -> tuple[float, int]:
        """(balance, parameters) of one of `networks`. Of those within the budgets, `select` takes the first of highest rank."""
        full = SubNetwork.full(self.choices.model)
        parts = [(axis, (net.executed_layers[0], full.layers[0]) if axis.of_layer else (net, full)) for axis in AXES.values()]
        balance = min(axis.size(part) / axis.size(whole) for axis, (part, whole) in parts)
        return balance, count_parameters(self.choices.model, net)

    def select(self, budgets: Sequence[Budget]) -> SubNetwork:
        """Choose the most balanced network within all budgets. Raises FlextronError if there is none."""
        return _highest("uniform", self, budgets)


@dataclass(frozen=True)
class MatFormer:
    """Selector of networks with all heads and the same MLP width in every layer (MatFormer, arXiv:2310.07707)."""

    choices: Choices

    def networks(self) -> list[SubNetwork]:
        """Networks that the selector chooses from: one for each candidate MLP width, the same in all layers, else full."""
        space = self.choices.space
        return [space.uniform(self.choices.model, ffn_hidden_size=width) for width in space.ffn_hidden_size]

    def rank(self, net: SubNetwork) -> int:
        """Number of parameters: of the networks within the budgets, `select` takes the first of the highest rank."""
        return count_parameters(self.choices.model, net)

    def select(self, budgets: Sequence[Budget]) -> SubNetwork:
        """Choose the largest network within all budgets. Raises FlextronError if there is none."""
        return _highest("matformer", self, budgets)


@dataclass(frozen=True)
class Random:
    """Selector of the best of some random networks that use nearly all of the first budget.

    Attributes:
        choices: choices of the layers.
        count: number of random networks.
        seed: seed of the draws.
        losses: function from a list of networks to the loss of each in nats per token.
    """

    choices: Choices
    count: int
    seed: int
    losses: Callable[[Sequence[SubNetwork]], Sequence[float]]

    def select(self, budgets: Sequence[Budget]) -> SubNetwork:
        """Draw random networks that meet all budgets, evaluate them, and choose the one of least loss; NaN counts as infinite.

        Raises FlextronError if no network is found that meets the budgets.
        """
        drawn = draw_near(self.choices, budgets, self.count, self.seed)
        losses = self.losses(drawn)
        return drawn[int(np.argmin(np.nan_to_num(losses, nan=np.inf)))]


@dataclass(frozen=True)
class Sensitivity:
    """Selector of the network with the least sum of its candidates' degradations, found exactly.

    Attributes:
        choices: choices of the layers.
        degradation_NK: loss of the full model with one block replaced by a candidate, minus the full model's loss, in nats per
            token (Flextron, figure 6).
    """

    choices: Choices
    degradation_NK: np.ndarray

    def select(self, budgets: Sequence[Budget]) -> SubNetwork:
        """Choose the network of least summed degradation within all budgets. Raises FlextronError if there is none."""
        found = cheapest(self.choices, self.degradation_NK, [(b.cost, 0.0, b.limit) for b in budgets])
        if found is None:
            raise FlextronError(f"no network keeps to {' and '.join(map(str, budgets))} together: raise one of the budgets")
        return found


def _highest(name: str, selector: Uniform | MatFormer, budgets: Sequence[Budget]) -> SubNetwork:
    """First network of the highest rank within all budgets.

    Raises FlextronError, which names the selector `name`, if none of its networks is within all budgets.
    """
    networks = selector.networks()
    fitting = [net for net in networks if all(budget.allows(net) for budget in budgets)]
    if not fitting:
        least = min(networks, key=lambda net: count_parameters(selector.choices.model, net))
        costs = ", ".join(f"{show(b.cost.name, b.cost.of(least))} ({b.cost.of(least) / b.cost.full:.3f})" for b in budgets)
        raise FlextronError(
            f"selector={name}: none of its {len(networks)} networks keeps to {' and '.join(map(str, budgets))}: "
            f"the smallest has {costs}"
        )
    return max(fitting, key=selector.rank)
