"""The axes of an elastic model: one record for everything that may vary. No torch import.

A candidate of an axis is a size, and a network of that size uses the *first* units of the axis. Everything that depends on what
may vary reads these records: spaces, networks, costs, tables, sorting, routers, selectors, export and reports. A new axis of the
layers is one record and the layer module that it names (tests/test_toy_axis.py adds one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families.tensors import Tensor, declare

ATTENTION_UNITS = ("kv_group", "query_head")


@dataclass(frozen=True)
class Axis:
    """One axis.

    name: its key in a space, a cost and a table. unit: the name of what it counts. title, short: its names in figures and tables.
    block: the block of a layer that computes it, which is the layer's attribute where the axis adds it; None for an axis of the
    network. full: the size in the full model. default: candidates of a space that names none.

    fields: of LayerChoice, or of SubNetwork for an axis of the network, with what each counts. The size is their product. The
    families' tensor table cuts a dimension of such a name to the field's value. split: the fields of a size (model, attention
    unit, size). step: what each candidate must be a multiple of, and why (model, granularity, attention unit).

    starts: the module of a layer with which the block begins, for timing it; by default the block. observed: the module whose
    `observe` sees the activations that score the units: the last dimension holds the fields' units, and each unit's channels.
    followed_by: the weight whose columns these enter. parallel: the units are divided over tensor-parallel ranks, in dealt order.

    module: for an added axis the ElasticBlock (layers/block.py) that it brings, made from (config, space=space): the layer's
    attribute `block`. tensors: its entries of the tensor table, {name within the layer: dimensions}.
    """

    name: str
    unit: str
    title: str
    short: str
    block: str | None
    full: Callable[[ModelConfig], int]
    fields: Mapping[str, str]
    split: Callable[[ModelConfig, str, int], tuple[int, ...]] = lambda model, unit, size: (size,)
    step: Callable[[ModelConfig, int, str], tuple[int, str]] = lambda model, granularity, unit: (1, "1")
    default: Sequence[float] = (1.0,)
    starts: str = ""
    observed: str = ""
    followed_by: str = ""
    parallel: bool = True
    module: Callable[..., Any] | None = None
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def of_layer(self) -> bool:
        """True if every layer has a choice of its own, False if the network has one."""
        return self.block is not None

    def size(self, chosen: object) -> int:
        """The size that a LayerChoice, or for an axis of the network a SubNetwork, has."""
        return math.prod(getattr(chosen, name) for name in self.fields)

    def whole(self, model: ModelConfig) -> tuple[int, ...]:
        """The fields of the full size."""
        return self.split(model, "kv_group", self.full(model))

    def unit_field(self, model: ModelConfig, attention_unit: str) -> str:
        """The field in which sizes differ: the units that are sorted and dropped."""
        smaller = self.full(model) - self.step(model, 1, attention_unit)[0]
        pairs = zip(self.fields, self.split(model, attention_unit, smaller), self.whole(model), strict=True)
        return next(name for name, some, whole in pairs if some != whole)

    def candidates(self, model: ModelConfig, granularity: int, attention_unit: str, values: Sequence[float]) -> tuple[int, ...]:
        """Absolute sizes, increasing, of fractions and sizes, and the full size. Raises FlextronError for one that is none."""
        name, full = self.name, self.full(model)
        step, why = self.step(model, granularity, attention_unit)
        if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not values:
            raise FlextronError(f"space.{name} must be a list of fractions or sizes, not {values!r}")
        sizes = {full}
        if any(isinstance(value, float) for value in values):  # YAML writes the whole as 1 or 1.0; among fractions both mean all
            values = [1.0 if value == 1 and not isinstance(value, bool) else value for value in values]
        for value in [*values, full]:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise FlextronError(f"space.{name}: {value!r} is neither a fraction nor a size")
            size = value if isinstance(value, int) else value * full
            shown = f"{value}" if isinstance(value, int) else f"{value:g} x {full} = {size:g}"
            if not 0 < size <= full:
                raise FlextronError(f"space.{name}: {shown} is not within 1..{full}")
            if abs(size - round(size)) > 1e-6 or round(size) % step:
                below = int(size // step) * step
                nearby = [str(s) for s in (below, below + step) if 0 < s <= full and s % step == 0 and full % step == 0]
                hint = f"; nearest: {' or '.join(nearby)}" if nearby else "; choose a smaller space.granularity"
                if full % step:
                    shown = f"the full size {full}"
                wanted = "a whole number" if step == 1 else f"a multiple of {step} ({why})"
                raise FlextronError(f"space.{name}: {shown} is not {wanted}{hint}")
            sizes.add(round(size))
        return tuple(sorted(sizes))


def _split_heads(model: ModelConfig, attention_unit: str, heads: int) -> tuple[int, int]:
    """(KV groups, query heads of each): whole groups are dropped, or every group loses query heads."""
    if attention_unit == "kv_group":
        return heads // model.query_heads_per_group, model.query_heads_per_group
    return model.num_query_groups, heads // model.num_query_groups


def _step_of_heads(model: ModelConfig, granularity: int, attention_unit: str) -> tuple[int, str]:
    if attention_unit != "kv_group":
        return model.num_query_groups, f"the number of KV groups, {model.num_query_groups}"
    more = f" x {model.query_heads_per_group} query heads per KV group" if model.query_heads_per_group > 1 else ""
    return granularity * model.query_heads_per_group, f"granularity {granularity}{more}"


_QUARTERS = (0.25, 0.5, 0.75, 1.0)
HEADS = Axis(
    "heads",
    unit="heads",
    title="Attention heads",
    short="Heads",
    block="attention",
    full=lambda model: model.num_attention_heads,
    fields={"kv_groups": "KV groups", "query_heads_per_group": "query heads"},
    split=_split_heads,
    step=_step_of_heads,
    default=_QUARTERS,
    starts="input_layernorm",
    observed="self_attention.linear_proj",
    followed_by="self_attention.linear_proj.weight",
)
FFN_HIDDEN_SIZE = Axis(
    "ffn_hidden_size",
    unit="neurons",
    title="FFN width",
    short="FFN",
    block="mlp",
    full=lambda model: model.ffn_hidden_size,
    fields={"ffn_hidden_size": "neurons"},
    step=lambda model, granularity, unit: (granularity, f"granularity {granularity}"),
    default=_QUARTERS,
    starts="pre_mlp_layernorm",
    observed="mlp",
    followed_by="mlp.linear_fc2.weight",
)
HIDDEN_SIZE = Axis(
    "hidden_size",
    unit="channels",
    title="Hidden size",
    short="Hidden",
    block=None,
    full=lambda model: model.hidden_size,
    fields={"hidden_size": "channels"},
    parallel=False,
)
DEPTH = Axis(
    "depth",
    unit="layers",
    title="Executed layers",
    short="Layers",
    block=None,
    full=lambda model: model.num_layers,
    fields={"depth": "layers"},
    parallel=False,
)

# In the order in which sizes are given, and in which blocks of a layer are computed. An axis is added by adding its record.
AXES: dict[str, Axis] = {axis.name: axis for axis in (HEADS, FFN_HIDDEN_SIZE, HIDDEN_SIZE, DEPTH)}


def layer_axes() -> list[Axis]:
    """Axes of which every layer has a choice."""
    return [axis for axis in AXES.values() if axis.of_layer]


def network_axes() -> list[Axis]:
    """Axes of which the network has one choice."""
    return [axis for axis in AXES.values() if not axis.of_layer]


def layer_fields() -> list[str]:
    """Names of all fields of LayerChoice that are sizes."""
    return [name for axis in layer_axes() for name in axis.fields]


def added_tensors() -> tuple[Tensor, ...]:
    """Tensors that added axes bring beyond the families' table."""
    return tuple(t for axis in layer_axes() for t in declare(axis.tensors, tuple(axis.fields) if axis.parallel else ()))
