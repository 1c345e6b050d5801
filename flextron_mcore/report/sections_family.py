"""The section about `family`: a model for every budget. Losses are in nats per token."""

from __future__ import annotations

from collections.abc import Sequence

from flextron_mcore.report import figures, figures_family
from flextron_mcore.report.collect_family import Family
from flextron_mcore.report.drawing import stem
from flextron_mcore.report.parts import Section, Table, cost_unit, loss, percent, significant, spread


def family_sections(families: Sequence[Family]) -> list[Section]:
    """A part of the page for each `family` directory."""
    parts = []
    for i, family in enumerate(families, start=1):
        named = [(member.budget, member.subnetwork) for member in family.members[::-1]]
        pictures = figures_family.losses(family)
        pictures.append(figures.layer_grid(named, family.model, f"{stem(family.label)}_widths", f"{family.label}: "))
        note = f"What selector {family.selector} chooses for each budget, each a model of its own. Shares are of the full model’s"
        note += " costs. A mean with a range in brackets: the layers differ."
        title = "A model for every budget" + (f" ({family.label})" if len(families) > 1 else "")
        parts.append(Section(f"models{i if i > 1 else ''}", title, note, [_table(family)], pictures))
    return parts


def _table(family: Family) -> Table:
    model, members = family.model, family.members
    columns: list[tuple[str, list[str]]] = [("Budget", [member.budget for member in members])]
    for cost in family.costs:
        name, unit = cost_unit(cost, max(member.costs[cost][0] for member in members))
        pairs = [member.costs[cost] for member in members]
        columns.append((name, [f"{significant(value / unit)} ({percent(share)})" for value, share in pairs]))
    columns.append(("Mean loss", [loss(member.loss) for member in members]))
    columns.append((f"Hidden of {model.hidden_size:,}", [f"{member.subnetwork.hidden_size:,}" for member in members]))
    columns.append((f"Layers of {model.num_layers}", [str(member.depth) for member in members]))
    for head, full, axis in (
        ("Heads", model.num_attention_heads, "num_attention_heads"),
        ("FFN", model.ffn_hidden_size, "ffn_hidden_size"),
    ):
        widths = [[getattr(layer, axis) for layer in member.subnetwork.layers if layer.executed] for member in members]
        columns.append((f"{head} of {full:,}", [spread(row) for row in widths]))
    columns.append(("Exports", [", ".join(member.exports) or "–" for member in members]))
    return Table([head for head, _ in columns], [list(row) for row in zip(*(cells for _, cells in columns), strict=True)])
