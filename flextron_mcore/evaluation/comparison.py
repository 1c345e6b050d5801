"""Comparison of selectors, and of random sub-networks of equal cost (Flextron, figures 5 and 13, Table 3): rows of metrics.json.

A share is a cost divided by the full model's cost. Losses are in nats per token; a mean loss is the mean over domains.
"""

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
    """Row of metrics.json with the size, cost and losses of a network. Call on all ranks.

    Args:
        net: the network.
        cost: cost to report.
        losses: evaluator of the model.
    """
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
    """Rows of metrics.json with the network that each selector chooses for each target. Call on all ranks.

    Uniform and MatFormer skip targets below their smallest network. Raises FlextronError if another selector finds no network.

    Args:
        selectors: {name: selector}.
        cost: cost of the budgets.
        targets: budgets as shares of the full model's cost.
        losses: evaluator of the model.
    """
    rows = []
    for name, selector in selectors.items():
        for target in targets:
            try:
                net = selector.select([Budget(cost, target * cost.full)])
            except FlextronError:
                if isinstance(selector, Uniform | MatFormer):  # their few networks do not reach down to every target
                    continue
                raise
            rows.append({"selector": name, "target": target, "subnetwork": net.to_dict(), **network_row(net, cost, losses)})
    return rows


def equal_rows(selectors: Mapping[str, Selector], cost: Cost, losses: Evaluator) -> list[Row]:
    """Rows of metrics.json, one for each network of Uniform and MatFormer, with the network that the router chooses for its cost.

    Call on all ranks.

    Args:
        selectors: {name: selector}; the columns of the router are None without a selector "router".
        cost: cost that is compared.
        losses: evaluator of the model.
    """
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
    """Row of metrics.json with the losses of random networks at a budget, and the share of them that the router's network beats.

    Call on all ranks.

    Args:
        target: budget, as a share of the full model's cost.
        drawn: random networks within the budget.
        cost: cost that the budget limits.
        losses: evaluator of the model.
        rows: result of `selected_rows`, with the router's network for the same budget.
    """
    found = [losses.mean(net) for net in drawn]
    router = next((row for row in rows if (row["selector"], row["target"]) == ("router", target)), None)
    # If few networks have this cost, the router's own may be among those drawn.
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
    """Row of metrics.json with the size, cost and losses of a separately trained dense model.

    The cost is None unless the space has a network of the model's shape.

    Args:
        name: name of the model.
        arch: its architecture.
        cost: cost to report.
        found: {domain: loss}.
    """
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
    """Rows of metrics.json with scaling laws (Flextron, eq. 12), over parameters and over cost.

    Each law is fitted to the networks of one selector and the full model.

    Args:
        selectors: names of the selectors.
        rows: result of `selected_rows`.
        full: `network_row` of the full model.
    """
    laws = []
    for name in selectors:
        points = [*(row for row in rows if row["selector"] == name), full]
        for of in ("non_embedding_parameters", "cost"):
            unique = {point[of]: point["mean_loss"] for point in points}
            laws.append({"selector": name, "of": of, "points": len(unique), **fit(list(unique), list(unique.values()))})
    return laws
