"""Topic of `family`: a network for every budget, with costs, losses and widths. Losses are in nats per token. No torch import.

Costs are in their own units (cost.py) and as fractions of the full model's.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from flextron_mcore.config import ModelConfig
from flextron_mcore.report.drawing import Picture, Theme, chart, label_points, picture
from flextron_mcore.report.networks import layer_columns, layer_grid, network_columns
from flextron_mcore.report.reader import StageOutput
from flextron_mcore.report.text import cost_unit, loss, lower, percent, short, significant, stem
from flextron_mcore.report.topic import Column, Highlights, Section, Table, Topic, numbered
from flextron_mcore.space import SubNetwork

SHOWN = ("parameters", "latency")  # costs that losses are drawn against


@dataclass(frozen=True)
class MemberCost:
    """Cost of a family's network: its value in the cost's own unit, and its share of the full model's cost."""

    value: float
    share: float


@dataclass(frozen=True)
class Member:
    """Network that `flextron family` chose for one budget.

    Attributes:
        budget: name of the budget, as text.
        subnetwork: sizes of the network.
        costs: {name of the cost: value in the cost's own unit, and share of the full model's cost}.
        loss: loss in nats per token, mean over domains; None if it was not evaluated.
        exports: {format: name of the export's directory within the stage's}.
        compensated: loss with the weights that compensate=true refitted, as exported; None for exports of the plain slice.
    """

    budget: str
    subnetwork: SubNetwork
    costs: dict[str, MemberCost]
    loss: float | None
    exports: dict[str, str]
    compensated: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Network as plain types, as in metrics.json, with hidden size and number of executed layers added."""
        costs = {name: asdict(cost) for name, cost in self.costs.items()}
        sizes = {"hidden_size": self.subnetwork.hidden_size, "depth": self.subnetwork.depth}
        return {**self.__dict__, "subnetwork": self.subnetwork.to_dict(), "costs": costs, **sizes}


@dataclass(frozen=True)
class Family:
    """Result of one directory that `flextron family` wrote, its networks from the fewest parameters to the most."""

    label: str
    model: ModelConfig
    selector: str
    networks: list[Member]

    @property
    def costs(self) -> list[str]:
        """Names of the costs that are known for every network."""
        return [name for name in self.networks[0].costs if all(name in member.costs for member in self.networks)]


def read(output: StageOutput) -> Family:
    """Result of one `family` directory. Raises FlextronError without networks."""
    output.metrics.refuse_empty("networks")
    found = output.into(Family)
    size = lambda member: member.costs["parameters"].value if "parameters" in member.costs else 0.0  # noqa: E731
    return replace(found, networks=sorted(found.networks, key=size))


def sections(results: list[Family]) -> list[Section]:
    """Section of the page for each directory: costs, losses and widths of the networks."""
    parts = []
    for family, number, label in numbered(results):
        named = [(member.budget, member.subnetwork) for member in family.networks[::-1]]
        pictures = loss_pictures(family)
        pictures.append(layer_grid(named, family.model, f"{stem(family.label)}_widths", f"{family.label}: "))
        note = (
            f"The network that the selector `{family.selector}` chooses for each budget. In brackets: shares of the full model’s"
        )
        note += " cost; of widths, the range where layers differ."
        parts.append(Section(f"models{number}", f"A model for every budget{label}", note, [_table(family)], pictures, "budgets"))
    return parts


def highlights(results: list[Family]) -> Highlights:
    """Networks of each directory, for family.json: `budgets`, {directory: [network, by parameters]}."""
    return Highlights(values={"budgets": {family.label: [m.to_dict() for m in family.networks] for family in results}})


def _table(family: Family) -> Table:
    members, nets = family.networks, [member.subnetwork for member in family.networks]
    columns: list[Column] = [("Budget", [member.budget for member in members])]
    for cost in family.costs:
        found = [member.costs[cost] for member in members]
        name, unit = cost_unit(cost, max(each.value for each in found))
        columns.append((name, [f"{significant(each.value / unit)} ({percent(each.share)})" for each in found]))
    columns.append(("Mean loss", [loss(member.loss) for member in members]))
    if any(member.compensated is not None for member in members):
        columns.append(("Mean loss, compensated", [loss(member.compensated) for member in members]))
    columns += [*network_columns(nets, family.model), *layer_columns(nets, family.model)]
    columns.append(("Exports", [", ".join(member.exports) or "–" for member in members]))
    return Table.of_columns(columns)


def loss_pictures(family: Family) -> list[Picture]:
    """Charts of loss against parameters and, if known, against latency; none if no network was evaluated."""
    evaluated = [member for member in family.networks if member.loss is not None and math.isfinite(member.loss)]
    return [_loss_picture(family, evaluated, cost) for cost in SHOWN if cost in family.costs and evaluated]


def _loss_picture(family: Family, evaluated: list[Member], cost: str) -> Picture:
    members = sorted(evaluated, key=lambda member: member.costs[cost].value)
    label, unit = cost_unit(cost, max(member.costs[cost].value for member in members))
    points = [(member.costs[cost].value / unit, member.loss) for member in members]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = chart(figure, label)
        axes.plot(*zip(*points, strict=True), "o", color=theme.after, markersize=5.5)
        axes.margins(x=0.12, y=0.15)
        names = [(short(member.budget, 20), point, False) for member, point in zip(members, points, strict=True)]
        label_points(figure, axes, names, points, theme)

    series = ", ".join(f"{member.budget}: {y:.3f} at {x:.4g}" for member, (x, y) in zip(members, points, strict=True))
    words = f"Mean loss in nats per token against {lower(label)}, by budget: {series}."
    caption = f"{family.label}: mean loss against {cost}. Every point is named by its budget."
    return picture(f"{stem(family.label)}_loss_{cost}", words, caption, draw)


TOPIC = Topic(("family",), read, sections, highlights)
