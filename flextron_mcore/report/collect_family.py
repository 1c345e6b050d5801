"""What `family` writes: a network for every budget, with what it costs and loses. No torch import.

Losses are in nats per token, costs in their own units (cost.py) and as fractions of the full model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.report.reader import Reader, read_model, read_subnetwork
from flextron_mcore.space import SubNetwork


@dataclass(frozen=True)
class Member:
    """The network of one budget. costs: {name: (value, share of the full model's)}; loss: None where it was not evaluated."""

    budget: str
    subnetwork: SubNetwork
    costs: dict[str, tuple[float, float]]
    loss: float | None
    exports: dict[str, str]  # {format: directory}

    @property
    def depth(self) -> int:
        """Executed layers."""
        return sum(layer.executed for layer in self.subnetwork.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as in the metrics.json it was read from."""
        costs = {name: {"value": value, "share": share} for name, (value, share) in self.costs.items()}
        sizes = {"hidden_size": self.subnetwork.hidden_size, "depth": self.depth}
        return {**self.__dict__, "subnetwork": self.subnetwork.to_dict(), "costs": costs, **sizes}


@dataclass(frozen=True)
class Family:
    """One `family` directory, members from the smallest number of parameters to the largest."""

    label: str
    model: ModelConfig
    selector: str
    members: list[Member]

    @property
    def costs(self) -> list[str]:
        """Those that are known of every member."""
        return [name for name in self.members[0].costs if all(name in member.costs for member in self.members)]


def read_family(label: str, metrics: Reader) -> Family:
    """From metrics.json."""
    model, members = read_model(metrics), []
    for row in metrics.rows("networks"):
        costs = row.inner("costs")
        found = {name: (costs.inner(name).number("value"), costs.inner(name).number("share")) for name in costs.values}
        exports = row.inner("exports")
        names = {format_: exports.text(format_) for format_ in exports.values}
        members.append(Member(row.text("budget"), read_subnetwork(row, model), found, row.maybe("loss"), names))
    if not members:
        raise FlextronError(f"{metrics.where}: 'networks' is empty")
    members.sort(key=lambda member: member.costs.get("parameters", (0.0,)))
    return Family(label, model, metrics.text("selector"), members)
