"""What `router`, `joint` and `gumbel` write beyond other training stages: budgets and the signals of each step. No torch import.

Losses are in nats per token, budgets and shares in fractions of the full model's cost.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from flextron_mcore.config import ModelConfig
from flextron_mcore.report.collect_adaptive import Adaptive, read_adaptive
from flextron_mcore.report.reader import Reader, read_model, read_subnetwork
from flextron_mcore.space import SubNetwork

ROUTING_STAGES = ("router", "joint", "gumbel")


@dataclass(frozen=True)
class RoutedBudget:
    """The network that the routers select for `target`: what it costs (`share`), and what their bare argmax would cost."""

    target: float
    share: float
    argmax_share: float
    subnetwork: SubNetwork

    @property
    def name(self) -> str:
        """`60%`."""
        return f"{100 * self.target:.4g}%"


@dataclass(frozen=True)
class RoutingStep:
    """One training step; None where a value was not logged.

    loss: the full model's; routed: those of the step's routed networks. surrogate_loss: mean squared error of the surrogate on
    the step's new pairs, in nats squared; surrogate_error: that over the variance of the losses. follows: whether the routers
    were trained by the surrogate. temperature: of relaxed choices.
    """

    step: int
    loss: float
    routed: list[float]
    constraint_loss: float | None
    surrogate_loss: float | None
    surrogate_error: float | None
    follows: bool
    temperature: float | None = None

    @property
    def excess(self) -> float:
        """Mean loss of the routed networks above the full model's."""
        return sum(self.routed) / len(self.routed) - self.loss


@dataclass(frozen=True)
class Routing:
    """The routers' side of one directory of ROUTING_STAGES.

    threshold: the surrogate_error below which routers follow it. relaxed: they learn from relaxed choices (`gumbel`).
    """

    model: ModelConfig
    costs: list[str]
    surrogate: bool
    threshold: float
    budgets: list[RoutedBudget]
    steps: list[RoutingStep]
    adaptive: Adaptive | None = None
    relaxed: bool = False

    @property
    def signal(self) -> str:
        """What trained the routers, for tables."""
        if self.relaxed:
            return "relaxed choices"
        if self.adaptive:
            return "straight-through, a token"
        return "surrogate" if self.surrogate else "straight-through"

    def follows_from(self) -> int | None:
        """The first step at which the routers follow the surrogate, or None."""
        return next((row.step for row in self.steps if row.follows), None)

    def settles_from(self) -> int | None:
        """The first step, of those that follow the surrogate, at which its error is near what it stays at; None without such.

        Near: at most half above the median of the last quarter of the steps.
        """
        known = [row for row in self.steps if row.surrogate_error is not None and math.isfinite(row.surrogate_error)]
        if not known:
            return None
        level = statistics.median(row.surrogate_error for row in known[-max(1, len(known) // 4) :])
        return next((row.step for row in known if row.follows and row.surrogate_error <= 1.5 * level), None)


def read_routing(metrics: Reader, rows: Sequence[Reader]) -> Routing:
    """From metrics.json and the log's rows of event "train", in the order of their steps."""
    model, routers = read_model(metrics), metrics.inner("routers")
    if routers.has("kind"):
        steps = [_step(row) for row in rows]
        return Routing(model, routers.texts("costs"), False, 0.0, [], steps, read_adaptive(metrics))
    budgets = [
        RoutedBudget(
            *(row.number(key) for key in ("target", "share", "argmax_share")),
            read_subnetwork(row, model),
        )
        for row in metrics.rows("budgets")
    ]
    surrogate = routers.flag("surrogate")
    return Routing(
        model,
        routers.texts("costs"),
        surrogate,
        routers.number("threshold") if surrogate else routers.maybe("threshold") or 0.0,
        sorted(budgets, key=lambda budget: -budget.target),
        [_step(row) for row in rows],
        relaxed=metrics.text("stage") == "gumbel",
    )


def _step(row: Reader) -> RoutingStep:
    return RoutingStep(
        row.whole("step"),
        row.number("loss"),
        row.number_list("subnetwork_losses") if row.has("subnetwork_losses") else [],
        *(row.maybe(key) for key in ("constraint_loss", "surrogate_loss", "surrogate_error")),
        row.has("routers_follow_surrogate") and row.flag("routers_follow_surrogate"),
        row.maybe("temperature"),
    )
