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
    """Row of metrics.json with the numbers of parameters, the cost and the losses of a network. Call on all ranks.

    {"cost", "share": of the full model's cost, "parameters", "non_embedding_parameters", "loss": {domain: loss}, "mean_loss"}.

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
    """Rows of metrics.json, one for each selector and target, with the network that the selector chooses. Call on all ranks.

    A row is {"selector", "target", "subnetwork"} and the entries of `network_row`. Targets below the smallest network of Uniform
    or MatFormer have no row for this selector. Raises FlextronError if another selector finds no network.

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
    """Rows of metrics.json, one for each network of Uniform and MatFormer beside the router's network of equal cost.

    The router's network is the one that it chooses for a budget equal to the other network's cost. Call on all ranks.

    Args:
        selectors: {name: selector}; without a selector "router", `router_share` and `router_loss` are None.
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
    """Row of metrics.json with the losses of random networks at one budget, beside the loss of the router's network.

    `better_than` is the fraction of the random networks, other than the router's own, with a higher loss than that; None if there
    are no others. Call on all ranks.

    Args:
        target: budget, as a share of the full model's cost.
        drawn: random networks within the budget.
        cost: cost that the budget limits.
        losses: evaluator of the model.
        rows: result of `selected_rows`. Without a row of the router for `target`, the router's entries are None.
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
    """Row of metrics.json with the numbers of parameters, the cost and the losses of a separately trained dense model.

    "cost" is the cost of the sub-network with this model's shape; None if the elastic space has no such sub-network.

    Args:
        name: name of the model.
        arch: architecture of the dense model.
        cost: cost to report.
        found: {domain: loss in nats per token}.
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
    """Rows of metrics.json with scaling laws L(N) (Flextron, eq. 12), two for each selector.

    N is the number of non-embedding parameters in one and the cost in the other. A law is fitted to the networks of its selector
    and the full model; of networks with equal N only the last counts. A row is {"selector", "of": kind of N, "points": number of
    different N} and the result of `scaling.fit`.

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
