"""The section about adaptive routers: what tokens that choose for themselves lose, and what they spend.

Losses are in nats per token, budgets and shares in fractions of the full model's cost.
"""

from __future__ import annotations

from collections.abc import Sequence

from flextron_mcore.report import figures_adaptive
from flextron_mcore.report.collect import Training
from flextron_mcore.report.collect_adaptive import EvaluatedMix
from flextron_mcore.report.drawing import stem
from flextron_mcore.report.parts import Section, Table, loss, percent


def adaptive_section(training: Training) -> Section:
    """One directory's: static against adaptive, by domain, by block, and token by token."""
    found, costs = training.routing.adaptive, " and ".join(training.routing.costs)
    policies = [policy for policy in ("full", "own") if any(policy in budget.adaptive for budget in found.budgets)]
    head = ["Budget", "Static", "Share", *(text for policy in policies for text in (f"Adaptive, kv {policy}", "Share"))]
    rows = []
    for budget in found.budgets:
        row = [percent(budget.target), loss(budget.static_loss), percent(budget.static_share)]
        for policy in policies:
            mix = budget.adaptive.get(policy)
            row += [loss(mix.mean_loss if mix else None), percent(mix.share) if mix else "–"]
        rows.append(row)
    domains = list(found.full_loss)
    by_domain = []
    for budget in found.budgets:
        mix = budget.adaptive[found.kv_policy]
        cells = [f"{loss(mix.loss[domain])} at {percent(mix.shares[domain])}" for domain in domains]
        by_domain.append([percent(budget.target), *cells])
    name = stem(training.label)
    pictures = [
        figures_adaptive.pareto(found, costs, f"{name}_pareto", training.label),
        figures_adaptive.degradation(found, costs, f"{name}_domains", training.label),
        figures_adaptive.allocation(found, f"{name}_allocation", training.label),
        *(figures_adaptive.heat(row, f"{name}_tokens_{stem(row.domain)}", costs) for row in found.tokens),
    ]
    note = "Every token chooses its own levels. Loss on validation data, mean over domains, and the average share of the full"
    note += (
        f" model’s {costs} that tokens spent. The routers were trained with kv {found.kv_policy}: with full every token writes"
    )
    note += " all keys and values, with own only those of the heads that it uses."
    tables = [Table(head, rows), Table(["Budget", *domains], by_domain)]
    return Section(f"adaptive_{name}", f"A choice for every token ({training.label})", note, tables, pictures)


def evaluated_section(mixes: Sequence[EvaluatedMix]) -> Section:
    """What `evaluate selector=adaptive` found: a row for each directory."""
    domains = list(dict.fromkeys(domain for found in mixes for domain in found.mix.loss))
    rows = []
    for found in mixes:
        mix = found.mix
        cells = [f"{loss(mix.loss[d])} at {percent(mix.shares[d])}" if d in mix.loss else "–" for d in domains]
        rows.append(
            [found.label, found.cost, percent(found.budget), found.kv_policy, *cells, loss(mix.mean_loss), percent(mix.share)]
        )
    note = "Adaptive routers at one budget: validation loss, and the average share of the full model’s cost that tokens spent."
    head = ["Run", "Cost", "Budget", "KV policy", *domains, "Mean loss", "Share"]
    return Section("adaptive_evaluated", "Tokens that choose, evaluated", note, [Table(head, rows, left=2)], [])
