"""A model for every budget, from `family`: costs, losses and widths. Losses are in nats per token. No torch import.

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
    """One cost of a network, and its share of the full model's."""

    value: float
    share: float


@dataclass(frozen=True)
class Member:
    """The network of one budget. loss: None if it was not evaluated; exports: {format: directory}."""

    budget: str
    subnetwork: SubNetwork
    costs: dict[str, MemberCost]
    loss: float | None
    exports: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as in the metrics.json it was read from."""
        costs = {name: asdict(cost) for name, cost in self.costs.items()}
        sizes = {"hidden_size": self.subnetwork.hidden_size, "depth": self.subnetwork.depth}
        return {**self.__dict__, "subnetwork": self.subnetwork.to_dict(), "costs": costs, **sizes}


@dataclass(frozen=True)
class Family:
    """One `family` directory, networks from the smallest number of parameters to the largest."""

    label: str
    model: ModelConfig
    selector: str
    networks: list[Member]

    @property
    def costs(self) -> list[str]:
        """Names of the costs that every member has."""
        return [name for name in self.networks[0].costs if all(name in member.costs for member in self.networks)]


def read(output: StageOutput) -> Family:
    """One `family` directory."""
    output.metrics.refuse_empty("networks")
    found = output.into(Family)
    size = lambda member: member.costs["parameters"].value if "parameters" in member.costs else 0.0  # noqa: E731
    return replace(found, networks=sorted(found.networks, key=size))


def sections(results: list[Family]) -> list[Section]:
    """A part of the page for each directory."""
    parts = []
    for family, number, label in numbered(results):
        named = [(member.budget, member.subnetwork) for member in family.networks[::-1]]
        pictures = loss_pictures(family)
        pictures.append(layer_grid(named, family.model, f"{stem(family.label)}_widths", f"{family.label}: "))
        note = f"What selector {family.selector} chooses for each budget, each a model of its own. Shares are of the full model’s"
        note += " costs. A mean with a range in brackets: the layers differ."
        parts.append(Section(f"models{number}", f"A model for every budget{label}", note, [_table(family)], pictures))
    return parts


def highlights(results: list[Family]) -> Highlights:
    """The networks of each directory, for family.json."""
    return Highlights(values={"budgets": {family.label: [m.to_dict() for m in family.networks] for family in results}})


def _table(family: Family) -> Table:
    members, nets = family.networks, [member.subnetwork for member in family.networks]
    columns: list[Column] = [("Budget", [member.budget for member in members])]
    for cost in family.costs:
        found = [member.costs[cost] for member in members]
        name, unit = cost_unit(cost, max(each.value for each in found))
        columns.append((name, [f"{significant(each.value / unit)} ({percent(each.share)})" for each in found]))
    columns.append(("Mean loss", [loss(member.loss) for member in members]))
    columns += [*network_columns(nets, family.model), *layer_columns(nets, family.model)]
    columns.append(("Exports", [", ".join(member.exports) or "–" for member in members]))
    return Table.of_columns(columns)


def loss_pictures(family: Family) -> list[Picture]:
    """Loss against parameters, and against latency if that is known; none if nothing was evaluated."""
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
    caption = f"{family.label}: mean loss against {cost}; a point is the model of the budget that it is named by."
    return picture(f"{stem(family.label)}_loss_{cost}", words, caption, draw)


TOPIC = Topic(("family",), read, sections, highlights)
