"""What adaptive routers did on validation data, from their `router` or `joint` directory. No torch import.

Losses are in nats per token, budgets and shares in fractions of the full model's cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flextron_mcore.report.reader import Reader


@dataclass(frozen=True)
class Mix:
    """Tokens that chose for themselves. levels: for each domain, for each block, the share of tokens at each level."""

    loss: Mapping[str, float]
    mean_loss: float
    shares: Mapping[str, float]
    share: float
    levels: Mapping[str, list[list[float]]]


@dataclass(frozen=True)
class AdaptiveBudget:
    """One budget: the static routers' network, and the tokens' own choices, by KV policy."""

    target: float
    static_loss: float
    static_share: float
    adaptive: Mapping[str, Mix]


@dataclass(frozen=True)
class TokenCosts:
    """The first tokens of a text, and the share of the full model's cost that each was worth."""

    domain: str
    budget: float
    texts: list[str]
    shares: list[float]


@dataclass(frozen=True)
class Adaptive:
    """All that was measured. kv_policy: the one that the routers were trained with."""

    kv_policy: str
    full_loss: Mapping[str, float]
    budgets: list[AdaptiveBudget]
    tokens: list[TokenCosts]


@dataclass(frozen=True)
class EvaluatedMix:
    """One `evaluate selector=adaptive` directory. cost: what the budget and the shares are of."""

    label: str
    cost: str
    budget: float
    kv_policy: str
    mix: Mix


def read_evaluated(label: str, metrics: Reader) -> EvaluatedMix | None:
    """From metrics.json; None where networks were evaluated, and not tokens that choose."""
    if not metrics.has("kv_policy"):
        return None
    policy = metrics.choice("kv_policy", ("full", "own"))
    mix = _mix(metrics, metrics.inner("mean").number("loss"))
    return EvaluatedMix(label, metrics.text("cost"), metrics.number("budget"), policy, mix)


def read_adaptive(metrics: Reader) -> Adaptive:
    """From metrics.json."""
    budgets = []
    for row in metrics.rows("adaptive_budgets"):
        static, mixes = row.inner("static"), row.inner("adaptive")
        given = {policy: mixes.inner(policy) for policy in ("full", "own") if mixes.has(policy)}
        found = {policy: _mix(values, values.number("mean_loss")) for policy, values in given.items()}
        budgets.append(AdaptiveBudget(row.number("target"), static.number("mean_loss"), static.number("share"), found))
    tokens = [
        TokenCosts(row.text("domain"), row.number("budget"), row.texts("texts"), row.number_list("shares"))
        for row in metrics.rows("token_costs")
    ]
    policy = metrics.inner("routers").choice("kv_policy", ("full", "own"))
    return Adaptive(policy, metrics.numbers("full_loss"), sorted(budgets, key=lambda budget: budget.target), tokens)


def _mix(row: Reader, mean_loss: float) -> Mix:
    domains = row.numbers("loss")
    levels = {domain: [[float(x) for x in block] for block in row.inner("levels").values[domain]] for domain in domains}
    return Mix(domains, mean_loss, row.numbers("shares"), row.number("share"), levels)
