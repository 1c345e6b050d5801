"""Selectors side by side, and random sub-networks of equal cost (Flextron, figures 5 and 13, Table 3): rows of metrics.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.cost import Budget, Cost
from flextron_mcore.evaluation.evaluator import Evaluator
from flextron_mcore.evaluation.perplexity import mean
from flextron_mcore.evaluation.scaling import fit
from flextron_mcore.selection.selectors import MatFormer, Selector, Uniform
from flextron_mcore.space import SubNetwork, count_parameters

Row = dict[str, Any]


def network_row(net: SubNetwork, cost: Cost, losses: Evaluator) -> Row:
    """Size, cost and losses of a network."""
    (found,) = losses.losses([net])
    return {
        "cost": cost.of(net),
        "share": cost.of(net) / cost.full,
        "parameters": count_parameters(cost.model, net),
        "non_embedding_parameters": count_parameters(cost.model, net, embeddings=False),
        "loss": found,
        "mean_loss": mean(found),
    }


def selected_rows(selectors: Mapping[str, Selector], cost: Cost, targets: Sequence[float], losses: Evaluator) -> list[Row]:
    """Networks that each selector takes for each target, without targets for which it has none."""
    rows = []
    for name, selector in selectors.items():
        for target in targets:
            try:
                net = selector.select([Budget(cost, target * cost.full)])
            except FlextronError:
                if isinstance(selector, Uniform | MatFormer):  # which know few networks
                    continue
                raise
            rows.append({"selector": name, "target": target, "subnetwork": net.to_dict(), **network_row(net, cost, losses)})
    return rows


def equal_rows(selectors: Mapping[str, Selector], cost: Cost, losses: Evaluator) -> list[Row]:
    """Each network that the uniform selectors know, beside what the router takes for just that network's cost."""
    rows, router = [], selectors.get("router")
    for name, selector in selectors.items():
        for net in selector.networks() if isinstance(selector, Uniform | MatFormer) else ():
            by_router = router.select([Budget(cost, cost.of(net))]) if router else None
            rows.append(
                {
                    "selector": name,
                    "subnetwork": net.to_dict(),
                    "share": cost.of(net) / cost.full,
                    "mean_loss": losses.mean(net),
                    "router_share": cost.of(by_router) / cost.full if by_router else None,
                    "router_loss": losses.mean(by_router) if by_router else None,
                }
            )
    return rows


def random_row(target: float, drawn: Sequence[SubNetwork], cost: Cost, losses: Evaluator, rows: Sequence[Row]) -> Row:
    """Losses of random networks of a target's cost, and the share of them that the router's network in `rows` is better than."""
    found = [losses.mean(net) for net in drawn]
    router = next((row for row in rows if (row["selector"], row["target"]) == ("router", target)), None)
    # Where networks are few, chance draws the router's own, too.
    others = [loss for net, loss in zip(drawn, found, strict=True) if router and net.to_dict() != router["subnetwork"]]
    return {
        "target": target,
        "shares": [cost.of(net) / cost.full for net in drawn],
        "mean_losses": found,
        "router_share": router and router["share"],
        "router_loss": router and router["mean_loss"],
        "better_than": sum(loss > router["mean_loss"] for loss in others) / len(others) if others else None,
    }


def dense_row(name: str, arch: ModelConfig, cost: Cost, found: dict[str, float]) -> Row:
    """A dense model with losses `found`. Its cost is known where it has the shape of a network of the family."""
    same = SubNetwork.full(arch)
    try:
        cost.space.check(cost.model, same)
        known = cost.of(same) if arch.kv_channels == cost.model.kv_channels else None
    except FlextronError:
        known = None
    return {
        "name": name,
        "parameters": count_parameters(arch),
        "non_embedding_parameters": count_parameters(arch, embeddings=False),
        "cost": known,
        "loss": found,
        "mean_loss": mean(found),
    }


def scaling_laws(selectors: Sequence[str], rows: Sequence[Row], full: Row) -> list[Row]:
    """Eq. 12 fitted to each selector's networks and the full model, over parameters and over cost."""
    laws = []
    for name in selectors:
        points = [*(row for row in rows if row["selector"] == name), full]
        for of in ("non_embedding_parameters", "cost"):
            unique = {point[of]: point["mean_loss"] for point in points}
            laws.append({"selector": name, "of": of, "points": len(unique), **fit(list(unique), list(unique.values()))})
    return laws
