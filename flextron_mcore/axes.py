"""Axes of an elastic model: one record for each dimension that may vary. No torch import.

A candidate of an axis is a size. A network of that size uses the *first* units of the axis. Spaces, networks, costs, tables,
sorting, routers, selectors, exports and reports read these records and name no axis themselves. A new layer axis is one record
and the layer module that it names (tests/test_toy_axis.py adds one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families.tensors import Tensor, declare

ATTENTION_UNITS = ("kv_group", "query_head")


@dataclass(frozen=True)
class Axis:
    """Dimension of the model that may vary.

    Each layer chooses its own size of a layer axis (heads, FFN neurons). The whole network has one size of a network axis (hidden
    size, depth).

    Attributes:
        name: key in an elastic space, a cost and a latency table.
        unit: plural name of the units, such as "heads".
        title, short: names in figures and tables.
        block: name of the layer's block (attention, mlp) that has the units; None for a network axis.
        full: function (model) that returns the size in the full model.
        fields: {field: its unit} of LayerChoice, or of SubNetwork for a network axis. The size is the product of the fields. The
            families' tensor table cuts dimensions of a field's name to its value.
        split: function (model, attention unit, size) that returns the fields of a size.
        step: function (model, granularity, attention unit) that returns (divisor of every candidate, reason as text).
        aligned: True if candidates below the full size are multiples of space.multiple, too: widths of matrices.
        default: candidates, as fractions of the full size, of a space that names none.
        starts: module of a layer at which timing of the block begins (the norm before it); empty for the block itself.
        observed: module whose method `observe` gets the activations from which importance of the units is scored. Their last
            dimension holds the units of all fields, and within them each unit's channels.
        followed_by: weight whose columns are multiplied with these activations.
        parallel: True if the units are divided over tensor-parallel ranks, dealt into buckets (checkpoint/sharding.py).
        module: for an axis that an extension adds the dotted path of its ElasticBlock (layers/block.py), such as
            "flextron_mcore.layers.adapter.Adapter". It is built as Adapter(config, space=space), and becomes the attribute of the
            layer that `block` names. None for a built-in axis.
        tensors: for such an axis {name within the layer: field that gives the size of each dimension} of its tensors.
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
    aligned: bool = False
    default: Sequence[float] = (1.0,)
    starts: str = ""
    observed: str = ""
    followed_by: str = ""
    parallel: bool = True
    module: str | None = None
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def of_layer(self) -> bool:
        """True for a layer axis, false for a network axis."""
        return self.block is not None

    def size(self, chosen: object) -> int:
        """Size of this axis in a LayerChoice, or for a network axis in a SubNetwork."""
        return math.prod(getattr(chosen, name) for name in self.fields)

    def whole(self, model: ModelConfig) -> tuple[int, ...]:
        """Values of `fields` in the full model, in their order; for heads (KV groups, query heads of a group)."""
        return self.split(model, "kv_group", self.full(model))

    def unit_field(self, model: ModelConfig, attention_unit: str) -> str:
        """Name of the field in which candidates differ, whose units are sorted and dropped.

        For heads it is "kv_groups" or "query_heads_per_group", depending on the attention unit.
        """
        smaller = self.full(model) - self.step(model, 1, attention_unit)[0]
        pairs = zip(self.fields, self.split(model, attention_unit, smaller), self.whole(model), strict=True)
        return next(name for name, some, whole in pairs if some != whole)

    def candidates(
        self,
        model: ModelConfig,
        granularity: int,
        attention_unit: str,
        values: Sequence[float],
        rounded: bool = False,
        multiple: int = 1,
    ) -> tuple[int, ...]:
        """Absolute candidates in increasing order, the full size included. Raises FlextronError for an invalid value.

        Args:
            model: architecture of the full model.
            granularity, attention_unit: fields of the elastic space (ElasticSpace).
            values: fractions (floats) and sizes (integers).
            rounded: round the default fractions to the nearest size that is possible.
            multiple: divisor of the candidates below the full size, on an aligned axis.
        """
        name, full = self.name, self.full(model)
        whole = self.step(model, granularity, attention_unit)
        below_full = self._step(model, granularity, attention_unit, multiple)
        if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not values:
            raise FlextronError(f"space.{name} must be a list of fractions or sizes, not {values!r}")
        sizes = {full}
        if any(isinstance(value, float) for value in values):  # YAML may write 1.0 as 1: among fractions it means the full size
            values = [1.0 if value == 1 and not isinstance(value, bool) else value for value in values]
        for value in [*values, full]:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise FlextronError(f"space.{name}: {value!r} is neither a fraction nor a size")
            size = value if isinstance(value, int) else value * full
            if rounded and size != full and list(values) == list(self.default) and full % whole[0] == 0:
                size = min(full, max(1, round(size / below_full[0])) * below_full[0])
            step, why = whole if size == full else below_full
            shown = f"{value}" if isinstance(value, int) else f"{value:g} x {full} = {size:g}"
            if not 0 < size <= full:
                raise FlextronError(f"space.{name}: {shown} is not within 1..{full}")
            if abs(size - round(size)) > 1e-6 or round(size) % step:
                if full % whole[0]:
                    hint, shown = "choose a smaller space.granularity", f"the full size {full}"
                else:
                    below = int(size // step) * step
                    nearby = [str(s) for s in (below, min(below + step, full)) if s]
                    hint = f"nearest: {' or '.join(nearby)}; {self._possible(model, granularity, attention_unit, multiple)}"
                wanted = "a whole number" if step == 1 else f"a multiple of {step} ({why})"
                raise FlextronError(f"space.{name}: {shown} is not {wanted}; {hint}")
            sizes.add(round(size))
        return tuple(sorted(sizes))

    def reason(
        self, model: ModelConfig, granularity: int, attention_unit: str, values: Sequence[float] | None, multiple: int = 1
    ) -> str:
        """Text that says where candidates come from: "as given", or the default fractions, and of what they became multiples.

        Args:
            model: architecture of the full model.
            granularity, attention_unit: fields of the elastic space (ElasticSpace).
            values: fractions and sizes; None for the default.
            multiple: divisor of the candidates below the full size, on an aligned axis.
        """
        if values is not None and list(values) != list(self.default):
            return "as given"
        full, (step, why) = self.full(model), self._step(model, granularity, attention_unit, multiple)
        shown = ", ".join(f"{value:g}" for value in self.default)
        rounded = any(value * full % step for value in self.default if value != 1)
        return f"default {shown} of {full}" + (f", rounded to multiples of {step} ({why})" if rounded else "")

    def _step(self, model: ModelConfig, granularity: int, attention_unit: str, multiple: int) -> tuple[int, str]:
        """Divisor of every candidate below the full size, and the reason as text.

        Args:
            model: architecture of the full model.
            granularity, attention_unit: fields of the elastic space (ElasticSpace).
            multiple: further divisor, on an aligned axis.
        """
        step, why = self.step(model, granularity, attention_unit)
        if not self.aligned or step % multiple == 0:
            return step, why
        return math.lcm(step, multiple), f"space.multiple {multiple}" + (f" and {why}" if multiple % step else "")

    def _possible(self, model: ModelConfig, granularity: int, attention_unit: str, multiple: int) -> str:
        """Advice for a message: all possible sizes, and those of the other attention unit if they differ.

        Args:
            model: architecture of the full model.
            granularity, attention_unit: fields of the elastic space (ElasticSpace).
            multiple: divisor of the candidates below the full size, on an aligned axis.
        """
        full = self.full(model)
        steps = {unit: self._step(model, granularity, unit, multiple)[0] for unit in (attention_unit, *ATTENTION_UNITS)}
        listed = {}
        for unit, step in steps.items():
            divides = full % self.step(model, granularity, unit)[0] == 0
            sizes = [*range(step, full, step), full] if divides else []
            listed[unit] = ", ".join(map(str, sizes)) if len(sizes) <= 16 else f"any multiple of {step} up to {full}"
        words = [f"use {listed[attention_unit]}"]
        for unit, sizes in listed.items():
            if sizes and sizes != listed[attention_unit]:
                words.append(f"with space.attention_unit={unit}: {sizes}")
        return ", or ".join(words)


def _split_heads(model: ModelConfig, attention_unit: str, heads: int) -> tuple[int, int]:
    """Split a number of query heads into (KV groups, query heads of each).

    Attention unit kv_group: groups are whole, and some are dropped. query_head: all groups stay, each with fewer query heads.
    """
    if attention_unit == "kv_group":
        return heads // model.query_heads_per_group, model.query_heads_per_group
    return model.num_query_groups, heads // model.num_query_groups


def _step_of_heads(model: ModelConfig, granularity: int, attention_unit: str) -> tuple[int, str]:
    """Divisor of every number of query heads that is a candidate, and the reason as text.

    Args:
        model: architecture of the full model.
        granularity, attention_unit: fields of the elastic space (ElasticSpace).
    """
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
    aligned=True,
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
    aligned=True,
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

# Order of the positional arguments of ElasticSpace.build; of layer axes also the order of blocks in a layer.
AXES: dict[str, Axis] = {axis.name: axis for axis in (HEADS, FFN_HIDDEN_SIZE, HIDDEN_SIZE, DEPTH)}


def layer_axes() -> list[Axis]:
    """Axes of which every layer chooses its own size (heads, FFN neurons), in the order of the layer's blocks."""
    return [axis for axis in AXES.values() if axis.of_layer]


def network_axes() -> list[Axis]:
    """Axes of which the whole network has one size: hidden size and depth (number of executed layers)."""
    return [axis for axis in AXES.values() if not axis.of_layer]


def layer_fields() -> list[str]:
    """Names of the fields of LayerChoice that are numbers of units, such as "kv_groups" and "ffn_hidden_size"."""
    return [name for axis in layer_axes() for name in axis.fields]


def added_tensors() -> tuple[Tensor, ...]:
    """Declarations of the tensors in `Axis.tensors` of all axes, beyond families.tensors.TENSORS; () with built-in axes only."""
    return tuple(t for axis in layer_axes() for t in declare(axis.tensors, tuple(axis.fields) if axis.parallel else ()))
