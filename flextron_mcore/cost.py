"""What a sub-network costs, and budgets for it. No torch import.

Latency, parameters and memory are all sums over blocks (Flextron, eq. 6), one for every hidden size, so one description serves
them: selectors, routers and reports see a `Cost`, never where it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import DTYPE_BYTES, SKIPPED, ElasticSpace, LayerChoice, SubNetwork, count_parameters, kv_cache_bytes

# unit as a user writes it: cost, and how many of the cost's own unit it is
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
    """A sum: a constant, and for every executed layer that of its attention block and that of its MLP block.

    name: a key of OWN_UNITS, which has the unit. heads, ffn_hidden_size: the cost of each candidate of `space`, in its order,
    with all hidden channels. narrow: the same for every smaller hidden size of the space. mixed: where tokens choose for
    themselves, what each of the MIXED adds (blocks.py), in attention and in MLP blocks, in a pass of so many `tokens`.
    """

    name: str
    model: ModelConfig
    space: ElasticSpace
    constant: float
    heads: tuple[float, ...]
    ffn_hidden_size: tuple[float, ...]
    narrow: tuple[tuple[int, Cost], ...] = ()
    mixed: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    tokens: int = 1

    def at(self, hidden_size: int) -> Cost:
        """The sum for networks of this hidden size."""
        return self if hidden_size == self.model.hidden_size else dict(self.narrow)[hidden_size]

    def of(self, net: SubNetwork) -> float:
        """Cost of a member of the space."""
        cost = self.at(net.hidden_size)
        return cost.constant + sum(cost.layer(layer) for layer in net.layers if layer.executed)

    def layer(self, choice: LayerChoice) -> float:
        """Cost of an executed layer with all hidden channels."""
        heads = self.space.heads.index(choice.num_attention_heads)
        return self.heads[heads] + self.ffn_hidden_size[self.space.ffn_hidden_size.index(choice.ffn_hidden_size)]

    def reaches(self, layers: int, least: float, most: float) -> bool:
        """Whether networks with so many layers and all hidden channels lie between the bounds, or on both sides of them."""
        low, high = (self.constant + layers * (pick(self.heads) + pick(self.ffn_hidden_size)) for pick in (min, max))
        return low <= most * (1 + 1e-12) and high >= least * (1 - 1e-12)

    @property
    def full(self) -> float:
        """Cost of the full model."""
        return self.constant + self.model.num_layers * (self.heads[-1] + self.ffn_hidden_size[-1])

    @property
    def smallest(self) -> float:
        """The least that a member of the space costs."""
        sums = [self, *(cost for _, cost in self.narrow)]
        return min(c.constant + self.space.depth[0] * (min(c.heads) + min(c.ffn_hidden_size)) for c in sums)


def parameter_cost(model: ModelConfig, space: ElasticSpace) -> Cost:
    """Exact numbers of parameters, embeddings included."""
    return _additive("parameters", model, space, lambda net: count_parameters(model, net))


def memory_cost(model: ModelConfig, space: ElasticSpace, dtype: str, batch_size: int, length: int) -> Cost:
    """Exact bytes of weights and of the keys and values of `batch_size` sequences of `length` tokens."""

    def size(net: SubNetwork) -> float:
        return count_parameters(model, net) * DTYPE_BYTES[dtype] + kv_cache_bytes(model, net, batch_size, length, dtype)

    return _additive("memory", model, space, size)


def _additive(name: str, model: ModelConfig, space: ElasticSpace, measure: Callable[[SubNetwork], float]) -> Cost:
    """The parts of a measure that is such a sum, found with one executed layer; what a layer always has goes to its heads."""

    def at(hidden_size: int) -> Cost:
        def one_layer(heads: int, width: int) -> float:
            layers = [space.layer_choice(model, heads, width), *[SKIPPED] * (model.num_layers - 1)]
            return measure(SubNetwork(hidden_size, tuple(layers)))

        constant = measure(SubNetwork(hidden_size, (SKIPPED,) * model.num_layers))
        heads = tuple(one_layer(size, 0) - constant for size in space.heads)
        widths = tuple(one_layer(space.heads[0], width) - heads[0] - constant for width in space.ffn_hidden_size)
        return Cost(name, model, space, constant, heads, widths)

    return replace(at(model.hidden_size), narrow=tuple((size, at(size)) for size in space.hidden_size[:-1]))


@dataclass(frozen=True)
class Budget:
    """At most `limit` of a cost."""

    cost: Cost
    limit: float

    def allows(self, net: SubNetwork) -> bool:
        """Whether `net` keeps to it."""
        return self.cost.of(net) <= self.limit * (1 + 1e-12)

    def __str__(self) -> str:
        return f"{self.cost.name} <= {show(self.cost.name, self.limit)}"


def parse_budget(text: str | float | Sequence, costs: Mapping[str, Cost]) -> list[Budget]:
    """Budgets as a user writes them; several must hold together.

    A number with a unit of UNITS (`25ms`, `3.4B`, `8GiB`), or a fraction of the full model's latency (`0.6`) or of another cost
    (`0.6 parameters`). costs: those that are known, by name. Raises FlextronError for an unknown unit, a cost that is not known,
    and a budget that is less than the smallest sub-network or more than the full model.
    """
    if isinstance(text, Sequence) and not isinstance(text, str):
        return [budget for part in text for budget in parse_budget(part, costs)]
    if isinstance(text, str) and "," in text:
        return parse_budget([part for part in text.split(",") if part.strip()], costs)
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([A-Za-z]*)\s*", str(text))
    try:
        number, unit = float(match[1]), match[2]
    except (TypeError, ValueError):
        raise FlextronError(f"budget={text}: is not a number with a unit, such as 0.6, 25ms, 3.4B or 8GiB") from None
    if unit and unit not in UNITS and unit not in OWN_UNITS:
        known = ", ".join([*OWN_UNITS, *UNITS])
        raise FlextronError(
            f"budget={text}: the unit '{unit}' is not known: use one of {known}; none is a fraction of the latency"
        )
    name, scale = UNITS.get(unit, (unit or "latency", None))
    if name not in costs:
        hint = "; give latency=, a table of `flextron latency`" if name == "latency" else ""
        raise FlextronError(f"budget={text}: is of {name}, which is not known here; known: {', '.join(costs)}{hint}")
    cost = costs[name]
    limit = number * (cost.full if scale is None else scale)
    if not cost.smallest * (1 - 1e-9) <= limit <= cost.full * (1 + 1e-9):
        low, high = (show(name, value) for value in (cost.smallest, cost.full))
        share = f"{cost.smallest / cost.full:.3f} of the full model"
        raise FlextronError(
            f"budget={text}: {show(name, limit)} is not within {low} (the smallest network, {share}) and {high} (the full one)"
        )
    return [Budget(cost, limit)]


def show(name: str, value: float) -> str:
    """A cost for people."""
    if name == "latency":
        return f"{value:.4g} ms"
    units = ((1e9, "B"), (1e6, "M"), (1e3, "K")) if name == "parameters" else ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    for size, unit in units:
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} {OWN_UNITS[name]}"
