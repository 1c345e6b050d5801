"""What `sensitivity` and `compare` write. No torch import.

Losses are in nats per token; costs in the unit of their kind (ms, parameters, bytes), shares in fractions of the full model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.cost import OWN_UNITS
from flextron_mcore.report.reader import Reader, Settings, read_model, read_settings, read_subnetwork
from flextron_mcore.space import SubNetwork

AXES = ("heads", "ffn_hidden_size")
SELECTORS = ("router", "uniform", "matformer", "sensitivity", "random")
FITTED = ("non_embedding_parameters", "cost")


@dataclass(frozen=True)
class BlockLoss:
    """One block (0-based `layer`, `axis` of AXES) replaced alone by its candidate `size`; degradation: loss above the full's."""

    layer: int
    axis: str
    size: int
    loss: float
    degradation: float


@dataclass(frozen=True)
class Sensitivity:
    """One `sensitivity` directory; `samples` samples."""

    label: str
    model: ModelConfig
    samples: int
    full_loss: float
    blocks: list[BlockLoss]
    settings: Settings

    def full_size(self, axis: str) -> int:
        """The full model's size of an axis."""
        return self.model.num_attention_heads if axis == "heads" else self.model.ffn_hidden_size

    def candidates(self, axis: str) -> list[int]:
        """The sizes of an axis that were tried, largest first."""
        return sorted({block.size for block in self.blocks if block.axis == axis}, reverse=True)

    def curve(self, axis: str, size: int) -> list[tuple[int, float]]:
        """(layer, degradation) in the order of the layers."""
        return sorted((block.layer, block.degradation) for block in self.blocks if (block.axis, block.size) == (axis, size))


@dataclass(frozen=True)
class Compared:
    """One evaluated network. target: the budget it was selected for; subnetwork, target None for the full model and dense ones.

    selector: one of SELECTORS, "full", or "dense" for a model that was trained from scratch at its size.
    """

    selector: str
    name: str
    target: float | None
    subnetwork: SubNetwork | None
    cost: float | None
    share: float | None
    parameters: int
    non_embedding_parameters: int
    loss: dict[str, float]
    mean_loss: float


@dataclass(frozen=True)
class RandomNetworks:
    """Random networks of one budget. better_than: the fraction of those that are not the routers' own whose loss is higher."""

    target: float
    shares: list[float]
    losses: list[float]
    router_share: float | None
    router_loss: float | None
    better_than: float | None


@dataclass(frozen=True)
class EqualCost:
    """A baseline's network, and what the routers reach at exactly its cost."""

    selector: str
    subnetwork: SubNetwork
    share: float
    mean_loss: float
    router_share: float | None
    router_loss: float | None


@dataclass(frozen=True)
class Fit:
    """L(N) = (N/Nc)^-alpha + E over `points` networks of a selector; N is `of` in its own unit.

    values, intervals: of Nc, alpha and E; intervals hold 95% confidence. None where the points do not determine the fit.
    """

    selector: str
    of: str
    points: int
    values: tuple[float, float, float] | None
    intervals: tuple[tuple[float, float] | None, ...]


@dataclass(frozen=True)
class Comparison:
    """One `compare` directory. cost: a key of OWN_UNITS; full_cost, smallest_cost in its unit; `samples` samples a domain."""

    label: str
    model: ModelConfig
    cost: str
    full_cost: float
    smallest_cost: float
    machine: dict[str, Any]
    setting: dict[str, Any]
    samples: int
    full: Compared
    networks: list[Compared]
    random: list[RandomNetworks]
    equal: list[EqualCost]
    dense: list[Compared]
    fits: list[Fit]
    settings: Settings

    def of(self, selector: str) -> list[Compared]:
        """The networks of one selector, the cheapest first."""
        return sorted((net for net in self.networks if net.selector == selector), key=lambda net: (net.cost, net.mean_loss))


def read_sensitivity(label: str, metrics: Reader) -> Sensitivity:
    """From the metrics.json of a `sensitivity` directory."""
    model, blocks = read_model(metrics), []
    for row in metrics.rows("blocks"):
        layer = row.whole("layer")
        if not 0 <= layer < model.num_layers:
            raise FlextronError(f"{row.where}: 'layer' must be within 0..{model.num_layers - 1}, not {layer}")
        axis, size = row.choice("axis", AXES), row.whole("size")
        blocks.append(BlockLoss(layer, axis, size, row.number("loss"), row.number("degradation")))
    if not blocks:
        raise FlextronError(f"{metrics.where}: 'blocks' is empty")
    return Sensitivity(label, model, metrics.whole("samples"), metrics.number("full_loss"), blocks, read_settings(metrics))


def read_comparison(label: str, metrics: Reader) -> Comparison:
    """From the metrics.json of a `compare` directory."""
    model, full_cost = read_model(metrics), metrics.number("full_cost")
    if not full_cost > 0:
        raise FlextronError(f"{metrics.where}: 'full_cost' must be more than 0, not {full_cost:g}")
    inner = lambda key: dict(metrics.inner(key).values) if metrics.has(key) else {}  # noqa: E731
    networks = []
    for row in metrics.rows("networks"):
        selector = row.choice("selector", SELECTORS)
        networks.append(_compared(row, selector, selector, row.number("share"), read_subnetwork(row, model)))
    return Comparison(
        label,
        model,
        metrics.choice("cost", tuple(OWN_UNITS)),
        full_cost,
        metrics.number("smallest_cost"),
        inner("machine"),
        inner("setting"),
        metrics.whole("samples"),
        _compared(metrics.inner("full"), "full", "full model", 1.0, None),
        networks,
        [_random(row) for row in metrics.rows("random")],
        [_equal(row, model) for row in metrics.rows("equal")],
        [_dense(row, full_cost) for row in metrics.rows("dense")],
        [_fit(row) for row in metrics.rows("scaling_law")],
        read_settings(metrics),
    )


def _compared(row: Reader, selector: str, name: str, share: float | None, subnetwork: SubNetwork | None) -> Compared:
    return Compared(
        selector,
        name,
        row.maybe("target"),
        subnetwork,
        row.maybe("cost") if selector == "dense" else row.number("cost"),
        share,
        row.whole("parameters"),
        row.whole("non_embedding_parameters"),
        row.numbers("loss") if row.has("loss") else {},
        row.number("mean_loss"),
    )


def _dense(row: Reader, full_cost: float) -> Compared:
    cost = row.maybe("cost")
    return _compared(row, "dense", row.text("name"), None if cost is None else cost / full_cost, None)


def _random(row: Reader) -> RandomNetworks:
    shares, losses = row.number_list("shares"), row.number_list("mean_losses")
    if len(shares) != len(losses):
        raise FlextronError(f"{row.where}: 'mean_losses' has {len(losses)} numbers, but 'shares' has {len(shares)}")
    router = (row.maybe(key) for key in ("router_share", "router_loss", "better_than"))
    return RandomNetworks(row.number("target"), shares, losses, *router)


def _equal(row: Reader, model: ModelConfig) -> EqualCost:
    return EqualCost(
        row.choice("selector", SELECTORS),
        read_subnetwork(row, model),
        row.number("share"),
        row.number("mean_loss"),
        row.maybe("router_share"),
        row.maybe("router_loss"),
    )


def _fit(row: Reader) -> Fit:
    keys = ("Nc", "alpha", "E")
    values = tuple(row.maybe(key) for key in keys)
    intervals = tuple(tuple(row.number_list(f"{key}_ci", 2)) if row.has(f"{key}_ci") else None for key in keys)
    determined = values if None not in values else None
    return Fit(row.choice("selector", SELECTORS), row.choice("of", FITTED), row.whole("points"), determined, intervals)
