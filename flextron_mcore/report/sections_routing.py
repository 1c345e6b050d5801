"""The sections about routers: their training, the networks they choose, and what the surrogate is good for.

Losses are in nats per token, targets and shares in fractions of the full model's cost.
"""

from __future__ import annotations

from collections.abc import Sequence

from flextron_mcore.report import figures
from flextron_mcore.report.collect import Training
from flextron_mcore.report.drawing import stem
from flextron_mcore.report.figures_routing import dynamics
from flextron_mcore.report.parts import Section, Table, loss, percent, spread
from flextron_mcore.report.sections import training_table
from flextron_mcore.report.sections_adaptive import adaptive_section


def routing_sections(routed: Sequence[Training]) -> list[Section]:
    """The parts of the page about `router`, `joint` and `gumbel` stages, for which there is data."""
    parts = [_budgets_section(routed)] if any(t.routing.budgets for t in routed) else []
    parts += [adaptive_section(t) for t in routed if t.routing.adaptive]
    parts.append(_training_section(routed))
    routers = [t for t in routed if t.kind == "router" and not t.routing.adaptive]
    if len(routers) > 1 and not all(t.routing.surrogate for t in routers):
        parts.append(_signals_section(routers))
    return parts


def _budgets_section(routed: Sequence[Training]) -> Section:
    routed = [t for t in routed if t.routing.budgets]
    tables, pictures = [], []
    for t in routed:
        model, budgets = t.routing.model, t.routing.budgets
        head = [f"Budget ({t.label})", "Share", "Share of the bare argmax"]
        head += [f"Heads of {model.num_attention_heads:,}", f"FFN of {model.ffn_hidden_size:,}"]
        head += [f"Hidden of {model.hidden_size:,}", f"Layers of {model.num_layers}"] if t.routing.relaxed else []
        rows = []
        for budget in budgets:
            layers = [layer for layer in budget.subnetwork.layers if layer.executed]
            widths = [spread([getattr(layer, name) for layer in layers]) for name in ("num_attention_heads", "ffn_hidden_size")]
            sizes = [f"{budget.subnetwork.hidden_size:,}", str(len(layers))] if t.routing.relaxed else []
            rows.append([budget.name, percent(budget.share), percent(budget.argmax_share), *widths, *sizes])
        tables.append(Table(head, rows))
        named = [(budget.name, budget.subnetwork) for budget in budgets]
        pictures.append(figures.layer_grid(named, model, f"{stem(t.label)}_widths", f"{t.label}: "))
    costs = " and ".join(dict.fromkeys(cost for t in routed for cost in t.routing.costs))
    note = f"What the trained routers choose for each budget. Budgets and shares are fractions of the full model’s {costs}; the"
    note += " selected network keeps to its budget, the bare argmax of the routers may not. A mean with a range in brackets: the"
    note += " layers differ."
    return Section("budgets", "Networks that the routers choose", note, tables, pictures)


def _training_section(routed: Sequence[Training]) -> Section:
    pictures = []
    for t in routed:
        pictures += [made] if (made := dynamics(t)) else []
        pictures += [figures.train_curve(t)] if t.kind in ("joint", "gumbel") and t.train else []
        pictures += figures.validation_curves(t)
    table = training_table(routed, [("Routers follow", [t.routing.signal for t in routed])])
    note = "Validation is that of the full model, in nats per token. Routers follow the gradient of a surrogate of the loss, or"
    note += " that of the loss itself through hard choices (straight-through)"
    relaxed = any(t.routing.relaxed for t in routed)
    note += ", or through relaxed ones whose temperature falls, at the end hard ones." if relaxed else "."
    return Section("routers", "Router training", note, [table], pictures)


def _signals_section(routers: Sequence[Training]) -> Section:
    names = list(dict.fromkeys(name for t in routers for name in t.last if name != "full"))
    rows = [[t.label, t.routing.signal, *(loss(t.last.get(name)) for name in names)] for t in routers]
    note = "The same routers trained with and without the surrogate: last validation loss of the network of each budget, in nats"
    note += " per token."
    return Section("signals", "Surrogate or straight-through", note, [Table(["Routers", "Signal", *names], rows, left=2)], [])
