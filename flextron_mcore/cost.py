"""Costs of sub-networks, and budgets for them. No torch import.

Latency, parameters and memory are sums over the blocks of a sub-network: Cost(M) = constant + sum_blocks cost(candidate), with
other terms for every hidden size. A budget T demands Cost(M) <= T (Flextron, eq. 6, for the latency).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import DTYPE_BYTES, SKIPPED, ElasticSpace, LayerChoice, SubNetwork, count_parameters, kv_cache_bytes

# {unit that a user writes: (name of the cost, factor to the cost's own unit)}
UNITS = {
    "us": ("latency", 1e-3),
    "ms": ("latency", 1.0),
    "s": ("latency", 1e3),
    "K": ("parameters", 1e3),
    "M": ("parameters", 1e6),
    "B": ("parameters", 1e9),
    **{f"{prefix}iB": ("memory", 2.0**power) for prefix, power in (("K", 10), ("M", 20), ("G", 30), ("T", 40))},
    **{f"{prefix}B": ("memory", 10.0**power) for prefix, power in (("k", 3), ("M", 6), ("G", 9), ("T", 12))},
}
OWN_UNITS = {"latency": "ms", "parameters": "parameters", "memory": "bytes"}


@dataclass(frozen=True)
class Cost:
    """Cost of sub-networks that is a sum: a constant, plus a term for each block (layer and layer axis) of executed layers.

    Attributes:
        name: latency, parameters or memory; its unit is in OWN_UNITS.
        model: architecture of the full model.
        space: space of the candidates.
        constant: cost of everything outside of the layers, with all hidden channels.
        candidates: {layer axis: cost of a block with each candidate, smallest first}, with all hidden channels.
        narrow: (hidden size, Cost whose constant and candidates are for this hidden size) of every smaller one of the space.
    """

    name: str
    model: ModelConfig
    space: ElasticSpace
    constant: float
    candidates: Mapping[str, tuple[float, ...]]
    narrow: tuple[tuple[int, Cost], ...] = ()

    def at(self, hidden_size: int) -> Cost:
        """Cost whose constant and candidates are for this hidden size, a candidate of the space."""
        return self if hidden_size == self.model.hidden_size else dict(self.narrow)[hidden_size]

    def of(self, net: SubNetwork) -> float:
        """Cost of a network of the space, in the cost's own unit (OWN_UNITS)."""
        cost = self.at(net.hidden_size)
        return cost.constant + sum(cost.layer(layer) for layer in net.layers if layer.executed)

    def layer(self, choice: LayerChoice) -> float:
        """Cost of one executed layer with the widths `choice` and all hidden channels (in an entry of `narrow` with its own)."""
        sizes = self.space.sizes
        return sum(self.candidates[axis.name][sizes[axis.name].index(axis.size(choice))] for axis in self.space.layer_axes)

    def layers(self, count: int, pick: Callable[[Sequence[float]], float]) -> float:
        """Cost of a network of `count` equal layers and all hidden channels (in an entry of `narrow` with its own).

        pick: function from the costs of an axis's candidates to the cost that is used, such as `min`.
        """
        return self.constant + count * sum(map(pick, self.candidates.values()))

    def reaches(self, layers: int, least: float, most: float) -> bool:
        """True if the costs of networks with this depth and full hidden size, cheapest to most expensive, overlap a range.

        Args:
            layers: number of executed layers.
            least, most: bounds of the range, in the cost's unit.
        """
        low, high = (self.layers(layers, pick) for pick in (min, max))
        return low <= most * (1 + 1e-12) and high >= least * (1 - 1e-12)

    @property
    def full(self) -> float:
        """Cost of the full model, in the cost's unit."""
        return self.layers(self.model.num_layers, lambda costs: costs[-1])

    @property
    def smallest(self) -> float:
        """Cost of the cheapest sub-network of the space, in the cost's unit."""
        return min(cost.layers(self.space.depth[0], min) for cost in (self, *(cost for _, cost in self.narrow)))


def parameter_cost(model: ModelConfig, space: ElasticSpace) -> Cost:
    """Cost that counts the parameters of a sub-network exactly, embeddings included. Its unit is one parameter."""
    return _additive("parameters", model, space, lambda net: count_parameters(model, net))


def memory_cost(model: ModelConfig, space: ElasticSpace, dtype: str, batch_size: int, length: int) -> Cost:
    """Cost that gives the memory of a sub-network exactly: bytes of its weights and of a KV cache.

    If only some layers have a sliding window, all count as layers without, because a Cost does not know a layer's index. The
    cost is an upper bound then.

    Args:
        model: architecture of the full model.
        space: space of the candidates.
        dtype: fp32, bf16 or fp16, of weights and cache.
        batch_size: number of sequences in the cache.
        length: tokens of each sequence.
    """

    cached = replace(model, sliding_window=None, window_attn_skip_freq=None) if model.window_attn_skip_freq else model

    def size(net: SubNetwork) -> float:
        return count_parameters(model, net) * DTYPE_BYTES[dtype] + kv_cache_bytes(cached, net, batch_size, length, dtype)

    return _additive("memory", model, space, size)


def _additive(name: str, model: ModelConfig, space: ElasticSpace, measure: Callable[[SubNetwork], float]) -> Cost:
    """Make a Cost from a function that is a sum over blocks, by evaluating it on networks with one executed layer.

    The part of a layer's cost that depends on no axis (such as norms) is added to the candidates of the first layer axis.

    Args:
        name: name of the cost.
        model: architecture of the full model.
        space: space of the candidates.
        measure: function (network) that returns its cost.
    """
    first, *others = space.layer_axes

    def at(hidden_size: int) -> Cost:
        def one_layer(**sizes: int) -> float:
            layer = space.layer_choice(model, *(sizes.get(axis.name, 0) for axis in space.layer_axes))
            return measure(SubNetwork(hidden_size, (layer, *[SKIPPED] * (model.num_layers - 1)))) - constant

        constant = measure(SubNetwork(hidden_size, (SKIPPED,) * model.num_layers))
        smallest = {first.name: space.sizes[first.name][0]}
        candidates = {first.name: tuple(one_layer(**{first.name: size}) for size in space.sizes[first.name])}
        for axis in others:
            sizes = space.sizes[axis.name]
            candidates[axis.name] = tuple(one_layer(**smallest, **{axis.name: size}) - one_layer(**smallest) for size in sizes)
        return Cost(name, model, space, constant, candidates)

    return replace(at(model.hidden_size), narrow=tuple((size, at(size)) for size in space.hidden_size[:-1]))


@dataclass(frozen=True)
class Budget:
    """Upper limit of a cost.

    Attributes:
        cost: cost that is limited.
        limit: largest value, in the cost's own unit (OWN_UNITS).
        asked: limit that the user gave if it is above the full model's cost, which `limit` then is; None otherwise.
    """

    cost: Cost
    limit: float
    asked: float | None = None

    def allows(self, net: SubNetwork) -> bool:
        """True if the cost of `net` is at most `limit`, up to rounding."""
        return self.cost.of(net) <= self.limit * (1 + 1e-12)

    def __str__(self) -> str:
        return f"{self.cost.name} <= {show(self.cost.name, self.limit)}"


def parse_budget(text: str | float | Sequence, costs: Mapping[str, Cost]) -> list[Budget]:
    """Parse budgets as a user writes them: one network must meet all of them.

    A budget with a unit that is above the full model's cost is lowered to this cost, and `Budget.asked` keeps what the user gave.
    Raises FlextronError for an unknown unit, a cost that is not available or named twice, a budget below the smallest
    sub-network's cost, and a fraction above 1.

    Args:
        text: a number with a unit of UNITS (`25ms`, `3.4B`, `8GiB`), or a fraction of the full model's latency (`0.6`) or other
            cost (`0.6 parameters`); or several, in a sequence or separated by commas.
        costs: available costs by name.
    """
    budgets = [_budget(part, number, unit, costs) for part, number, unit in read_budget(text)]
    names = [budget.cost.name for budget in budgets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        given = text if isinstance(text, str) else ",".join(map(str, text))
        raise FlextronError(f"budget={given}: limits {twice} twice: give one limit of each cost")
    return budgets


def read_budget(text: str | float | Sequence) -> list[tuple[str | float, float, str]]:
    """(part of the text, its number, its unit or "") of each budget that a user wrote.

    Raises FlextronError for a text that is no number with a known unit.

    Args:
        text: budgets as a user writes them: a number, a text such as "25ms" or "25ms,8GiB", or a sequence of these.
    """
    if isinstance(text, Sequence) and not isinstance(text, str):
        return [budget for part in text for budget in read_budget(part)]
    if isinstance(text, str) and re.fullmatch(r"\s*\d+,\d+\s*[A-Za-z]*\s*", text):
        raise FlextronError(f"budget={text}: has a comma within a number: write {text.replace(',', '.').strip()}")
    if isinstance(text, str) and "," in text:
        return read_budget([part for part in text.split(",") if part.strip()])
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([A-Za-z]*)\s*", str(text))
    try:
        number, unit = float(match[1]), match[2]
    except (TypeError, ValueError):
        raise FlextronError(f"budget={text}: is not a number with a unit, such as 0.6, 25ms, 3.4B or 8GiB") from None
    if unit and unit not in UNITS and unit not in OWN_UNITS:
        known = ", ".join([*OWN_UNITS, *UNITS])
        raise FlextronError(
            f"budget={text}: the unit '{unit}' is not known: use one of {known}, or none for a fraction of the latency"
        )
    return [(text, number, unit)]


def _budget(text: str | float, number: float, unit: str, costs: Mapping[str, Cost]) -> Budget:
    """Budget of a number with a unit, lowered to the full model's cost if it is a cost above that.

    Args:
        text: text that the user wrote, for messages.
        number: number in it.
        unit: unit in it, or name of a cost for a fraction; "" for a fraction of the latency.
        costs: available costs by name.

    Raises:
        FlextronError: the cost is not available, the budget is below the smallest sub-network's cost, or a fraction is above 1.
    """
    name, scale = UNITS.get(unit, (unit or "latency", None))
    if name not in costs:
        hint = "; for latency give latency=DIR, the directory of a `flextron latency` run" if name == "latency" else ""
        raise FlextronError(f"budget={text}: is of {name}, which is not available here; available: {', '.join(costs)}{hint}")
    cost = costs[name]
    limit = number * (cost.full if scale is None else scale)
    if scale is not None and limit > cost.full * (1 + 1e-9):
        return Budget(cost, cost.full, asked=limit)
    if not cost.smallest * (1 - 1e-9) <= limit <= cost.full * (1 + 1e-9):
        low, high = (show(name, value) for value in (cost.smallest, cost.full))
        share = f"{cost.smallest / cost.full:.3f} of the full model"
        raise FlextronError(
            f"budget={text}: {show(name, limit)} is not within {low} (the smallest network, {share}) and {high} (the full one)"
        )
    return Budget(cost, limit)


def show(name: str, value: float) -> str:
    """Format a cost with its unit, such as `3.4 B`. name: name of the cost; value: in the cost's own unit."""
    if name == "latency":
        return f"{value:.4g} ms"
    units = ((1e9, "B"), (1e6, "M"), (1e3, "K")) if name == "parameters" else ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    for size, unit in units:
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} {OWN_UNITS[name]}"
