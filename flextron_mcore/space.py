"""Elastic space (ElasticSpace), a sub-network chosen from it (SubNetwork), and the sub-network's parameters and bytes.

From Flextron (ICML 2024), section 2, eq. 1-2; hidden size and depth from LLaMaFlex (ICLR 2025). No torch import.
A candidate always uses the *first* units of an axis (axes.py), so sub-networks are nested.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flextron_mcore.axes import ATTENTION_UNITS, AXES, Axis, added_tensors, layer_axes, layer_fields
from flextron_mcore.config import FlextronError, ModelConfig, nearest
from flextron_mcore.digests import seal, unseal
from flextron_mcore.families import tensors
from flextron_mcore.files import explain, read_json

AUTOMATIC_GRANULARITIES = (8, 4, 2, 1)
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
ADAM_BYTES = {4: 8, 2: 12}  # {bytes of a weight: bytes of its optimizer state}: two moments, for bf16 also a main weight, in fp32


@dataclass(frozen=True)
class LayerChoice:
    """Widths of one layer.

    Attributes:
        executed: false for a skipped layer.
        kv_groups: number of KV groups.
        query_heads_per_group: query heads of each group.
        ffn_hidden_size: neurons of the MLP.
        added: (name, value) pairs of added axes' fields. Each is an attribute too, 0 if missing.
    """

    executed: bool
    kv_groups: int
    query_heads_per_group: int
    ffn_hidden_size: int
    added: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, fields: Mapping[str, int]) -> LayerChoice:
        """Executed layer with these {field: value}; missing fields are 0."""
        own = {name: fields.get(name, 0) for name in _OWN_FIELDS}
        return cls(True, **own, added=tuple((name, value) for name, value in fields.items() if name not in own))

    def __getattr__(self, name: str) -> int:
        if name in layer_fields():
            return dict(self.added).get(name, 0)
        raise AttributeError(name)

    @property
    def num_attention_heads(self) -> int:
        """Number of query heads of the layer."""
        return self.kv_groups * self.query_heads_per_group

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types: `executed` and every field."""
        return {"executed": self.executed, **{name: getattr(self, name) for name in _OWN_FIELDS}, **dict(self.added)}


_OWN_FIELDS = ("kv_groups", "query_heads_per_group", "ffn_hidden_size")
SKIPPED = LayerChoice(False, 0, 0, 0)


@dataclass(frozen=True)
class SubNetwork:
    """One sub-network: its hidden size, and the widths of every layer.

    >>> model = ModelConfig(
    ...     num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=67, max_position_embeddings=24, ffn_hidden_size=48
    ... )
    >>> net = SubNetwork.full(model)
    >>> net.layers[0].num_attention_heads, net.layers[0].ffn_hidden_size
    (4, 48)
    >>> SubNetwork.from_dict(net.to_dict()) == net
    True
    """

    hidden_size: int
    layers: tuple[LayerChoice, ...]

    @classmethod
    def full(cls, model: ModelConfig) -> SubNetwork:
        """Full model as a sub-network."""
        choice = _layer(model, "kv_group", {axis.name: axis.full(model) for axis in layer_axes()})
        return cls(model.hidden_size, (choice,) * model.num_layers)

    @property
    def executed_layers(self) -> list[LayerChoice]:
        """Layers that are not skipped, in order."""
        return [layer for layer in self.layers if layer.executed]

    @property
    def depth(self) -> int:
        """Number of executed layers."""
        return len(self.executed_layers)

    @property
    def is_uniform(self) -> bool:
        """True if all executed layers have the same widths, as in a stock dense model."""
        return len(set(self.executed_layers)) <= 1

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON and YAML."""
        return {"hidden_size": self.hidden_size, "layers": [layer.to_dict() for layer in self.layers]}

    def to_json(self) -> str:
        """Convert to JSON text: the keys of `to_dict`, a layer a line, and `digest`, a hash of them that shows later changes."""
        rows = ",\n".join("  " + json.dumps(layer.to_dict()) for layer in self.layers)
        return f'{{"hidden_size": {self.hidden_size}, "layers": [\n{rows}\n], "digest": "{seal(self.to_dict())["digest"]}"}}\n'

    @classmethod
    def from_dict(cls, values: Any, where: str = "sub-network") -> SubNetwork:
        """Build from the plain types of `to_dict`. Raises FlextronError that names `where`, the key and what is allowed."""
        if not isinstance(values, Mapping) or "hidden_size" not in values or not isinstance(values.get("layers"), Sequence):
            raise FlextronError(f"{where}: expected an object with 'hidden_size' and a list 'layers'")
        known = ["executed", *layer_fields()]
        layers = []
        for i, row in enumerate(values["layers"]):
            if not isinstance(row, Mapping):
                raise FlextronError(f"{where}: layers[{i}] is not an object with the keys {', '.join(known)}")
            for name in row:
                if name not in known:
                    raise FlextronError(f"{where}: layers[{i}] has the unknown key '{name}'{nearest(name, known)}")
            for name in ("executed", *_OWN_FIELDS):
                if name not in row:
                    raise FlextronError(f"{where}: layers[{i}] lacks '{name}'")
            for name, value in row.items():
                wanted = bool if name == "executed" else int
                if type(value) is not wanted:
                    raise FlextronError(f"{where}: layers[{i}].{name} must be of type {wanted.__name__}, not {value!r}")
            layers.append(replace(LayerChoice.of({k: v for k, v in row.items() if k != "executed"}), executed=row["executed"]))
        if type(values["hidden_size"]) is not int:
            raise FlextronError(f"{where}: hidden_size must be of type int, not {values['hidden_size']!r}")
        return cls(values["hidden_size"], tuple(layers))

    @classmethod
    def from_file(cls, path: str | Path) -> SubNetwork:
        """Read a JSON file written from `to_json`, or by hand and then without `digest`. Raises FlextronError naming the file."""
        try:
            values = unseal(read_json(path, given=True), Path(path))
        except FileNotFoundError:
            raise FlextronError(f"{path}: no such file: name one that `flextron select` wrote with out=") from None
        except (ValueError, OSError) as error:
            raise FlextronError(f"{path}: not readable as JSON: {explain(error)}") from None
        return cls.from_dict(values, str(path))


@dataclass(frozen=True)
class ElasticSpace:
    """Candidates of every axis, as absolute sizes in increasing order; the last one is the full size.

    Attributes:
        granularity: largest tensor-parallel size ever to be used. It divides every FFN width and, with kv_group, every number of
            KV groups (checkpoint/sharding.py).
        attention_unit: `kv_group`: a layer drops whole KV groups. `query_head`: every group stays and drops query heads.
        sizes: {axis: candidates} in the order of AXES; each is an attribute too. `heads`: query heads of a layer.
            `ffn_hidden_size`: neurons of a layer. `hidden_size`: channels of the residual stream. `depth`: executed layers.
        layer_ranking: layers by decreasing importance. A network of depth d executes the first d of them.
        modulation: blocks have learned gains that depend on the network's size (layers/block.py). It changes no sizes, so latency
            tables and routers of a space serve it with and without.
        compensation: kept query heads stand in for dropped ones (layers/compensation.py); with query_head only. It changes no
            sizes either.

    >>> model = ModelConfig(
    ...     num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=67, max_position_embeddings=24, ffn_hidden_size=48
    ... )
    >>> space = ElasticSpace.build(model, heads=(0.5, 1.0), ffn_hidden_size=(0.25, 0.5, 1.0))
    >>> space.heads, space.ffn_hidden_size, space.granularity
    ((2, 4), (12, 24, 48), 2)
    >>> space.uniform(model, heads=2, ffn_hidden_size=12).layers[1].num_attention_heads
    2
    """

    granularity: int
    attention_unit: str
    sizes: Mapping[str, tuple[int, ...]] = field(hash=False)
    layer_ranking: tuple[int, ...]
    modulation: bool = field(default=False, compare=False)
    compensation: bool = field(default=False, compare=False)

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        granularity: int | None = None,
        attention_unit: str | None = None,
        *sizes: Sequence[float],
        layer_ranking: Sequence[int] | None = None,
        modulation: bool = False,
        compensation: bool = False,
        multiple: int | None = None,
        **named: Sequence[float],
    ) -> ElasticSpace:
        """Build a space from fractions (floats in (0, 1]) and sizes (integers) of a model.

        The full size is added to every axis. Default fractions are rounded to sizes that divide, where they do not. Raises
        FlextronError for any other candidate that is out of range or does not divide.

        Args:
            model: architecture of the full model.
            granularity: None for the largest of 8, 4, 2, 1 that divides every candidate.
            attention_unit: None for kv_group if all candidates are whole groups, else query_head; where both must round, the one
                with more candidates.
            sizes: candidates of each axis, in the order of AXES; missing axes get their default.
            layer_ranking: layers by decreasing importance; None for the model's order, until `flextron importance` ranks them.
            modulation: blocks have gains that depend on the network's size.
            compensation: kept query heads stand in for dropped ones.
            multiple: divisor of the FFN widths and hidden sizes below the full ones, checked here and not kept; None for 1.
            named: candidates by the axis's name, instead of `sizes`.
        """
        wanted = {**dict(zip(AXES, sizes, strict=False)), **named}
        for name in wanted:
            if name not in AXES:
                known = ["granularity", "attention_unit", *AXES, "layer_ranking", "modulation", "compensation", "multiple"]
                raise FlextronError(f"unknown key 'space.{name}'{nearest(name, known)}")
        units = ATTENTION_UNITS if attention_unit is None else (attention_unit,)
        sizes = AUTOMATIC_GRANULARITIES if granularity is None else (granularity,)
        flags = {"modulation": modulation, "compensation": compensation}
        multiple = 1 if multiple is None else multiple
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise FlextronError(f"space.multiple must be a whole number of at least 1, not {multiple!r}")
        for rounded in (False, True):  # default fractions are rounded only where they do not divide
            fitting: list[ElasticSpace] = []
            errors: list[FlextronError] = []
            for unit, size in itertools.product(units, sizes):
                try:
                    fitting.append(cls._build(model, size, unit, wanted, layer_ranking, flags, rounded, multiple))
                except FlextronError as error:
                    errors.append(error)
            if fitting:  # the first one, or of rounded ones the first with most candidates
                return max(fitting, key=lambda space: rounded and sum(map(len, space.sizes.values())))
        raise errors[len(sizes) - 1]

    @classmethod
    def _build(
        cls,
        model: ModelConfig,
        granularity: int,
        attention_unit: str,
        wanted: Mapping[str, Sequence[float]],
        layer_ranking: Sequence[int] | None,
        flags: Mapping[str, bool],
        rounded: bool,
        multiple: int,
    ) -> ElasticSpace:
        """Build a space for one granularity and attention unit. Raises FlextronError if a candidate does not divide.

        Args:
            model: architecture of the full model.
            granularity: number that divides FFN widths and numbers of KV groups.
            attention_unit: kv_group or query_head.
            wanted: {axis: fractions and sizes}; other axes get their default.
            layer_ranking: layers by decreasing importance; None for the model's order.
            flags: values of `modulation` and `compensation`.
            rounded: round default fractions to sizes that divide, where they do not.
        """
        if isinstance(granularity, bool) or not isinstance(granularity, int) or granularity < 1:
            raise FlextronError(f"space.granularity must be a whole number of at least 1, not {granularity!r}")
        if attention_unit not in ATTENTION_UNITS:
            raise FlextronError(f"space.attention_unit={attention_unit!r} is not known: use one of {', '.join(ATTENTION_UNITS)}")
        ranking = tuple(range(model.num_layers)) if layer_ranking is None else tuple(layer_ranking)
        if sorted(ranking) != list(range(model.num_layers)):
            raise FlextronError(
                f"space.layer_ranking={list(ranking)}: must hold each of the layers 0..{model.num_layers - 1} once"
            )
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise FlextronError(f"space.{name}={value!r} is neither true nor false")
        if flags["compensation"] and attention_unit != "query_head":
            raise FlextronError("space.compensation=true needs space.attention_unit=query_head: set it, or sort again without")
        found = {
            name: axis.candidates(model, granularity, attention_unit, wanted.get(name, axis.default), rounded, multiple)
            for name, axis in AXES.items()
        }
        return cls(granularity, attention_unit, found, ranking, **flags)

    def __getattr__(self, name: str) -> tuple[int, ...]:
        if name != "sizes" and name in self.sizes:
            return self.sizes[name]
        raise AttributeError(name)

    @property
    def layer_axes(self) -> list[Axis]:
        """Axes of which every layer chooses its own size (heads, FFN neurons), in the order of the layer's blocks."""
        return [AXES[name] for name in self.sizes if AXES[name].of_layer]

    def elastic(self, axis: Axis) -> bool:
        """True if the axis has several candidates."""
        return len(self.sizes[axis.name]) > 1

    def layer_choice(self, model: ModelConfig, *sizes: int) -> LayerChoice:
        """LayerChoice of these sizes (query heads, neurons, ...) in the order of `layer_axes`; missing ones are full."""
        found = {axis.name: self.sizes[axis.name][-1] for axis in self.layer_axes}
        return _layer(model, self.attention_unit, found | dict(zip(found, sizes, strict=False)))

    def uniform(self, model: ModelConfig, *sizes: int | None, **named: int | None) -> SubNetwork:
        """Sub-network with the same widths in every executed layer. It is not checked against the space; `check` does that.

        Args:
            model: architecture of the full model.
            sizes: size of each axis in the order of AXES (heads, ffn_hidden_size, hidden_size, depth, without an extension); None
                or missing for the full size. A depth of d executes the first d layers of `layer_ranking`.
            named: sizes by the axis's name, instead of `sizes`.
        """
        given = {**dict(zip(self.sizes, sizes, strict=False)), **named}
        found = {name: given.get(name) or candidates[-1] for name, candidates in self.sizes.items()}
        choice = self.layer_choice(model, *(found[axis.name] for axis in self.layer_axes))
        return self.network(model, (choice,) * model.num_layers, found["hidden_size"], found["depth"])

    def network(
        self, model: ModelConfig, choices: Sequence[LayerChoice], hidden_size: int | None = None, depth: int | None = None
    ) -> SubNetwork:
        """Sub-network from the widths of its layers.

        Args:
            model: architecture of the full model.
            choices: widths of each layer of the full model; those of layers that are then skipped are ignored.
            hidden_size: channels of the residual stream; None for all.
            depth: number of executed layers, the most important ones; None for all.
        """
        kept = set(self.layer_ranking[:depth])
        layers = tuple(choice if i in kept else SKIPPED for i, choice in enumerate(choices))
        return SubNetwork(hidden_size or model.hidden_size, layers)

    def check(self, model: ModelConfig, net: SubNetwork, where: str = "sub-network") -> None:
        """Raise FlextronError unless `net` is a member of this space.

        Args:
            model: architecture of the full model.
            net: sub-network to check.
            where: its name in the message, such as its file.
        """
        if len(net.layers) != model.num_layers:
            raise FlextronError(f"{where}: has {len(net.layers)} layers, the model has {model.num_layers}")
        for name, size, shown in (
            ("hidden_size", net.hidden_size, f"hidden_size {net.hidden_size} is"),
            ("depth", net.depth, f"{net.depth} executed layers are"),
        ):
            if size not in self.sizes[name]:
                raise FlextronError(f"{where}: {shown} not a candidate {list(self.sizes[name])} of this space")
        for i, layer in enumerate(net.layers):
            for axis in self.layer_axes if layer.executed else ():
                values = tuple(getattr(layer, name) for name in axis.fields)
                allowed = [axis.split(model, self.attention_unit, size) for size in self.sizes[axis.name]]
                if values not in allowed and len(values) == 1:
                    candidates = list(self.sizes[axis.name])
                    raise FlextronError(
                        f"{where}: layers[{i}].{axis.name} {values[0]} is not a candidate {candidates} of this space"
                    )
                if values not in allowed:
                    has = " x ".join(f"{value} {unit}" for value, unit in zip(values, axis.fields.values(), strict=True))
                    pairs = ", ".join(" x ".join(map(str, pair)) for pair in allowed)
                    raise FlextronError(
                        f"{where}: layers[{i}] has {has}, not a candidate ({pairs}) of this space "
                        f"(attention_unit {self.attention_unit})"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON and YAML. `modulation` and `compensation` are left out if false."""
        values = {
            "granularity": self.granularity,
            "attention_unit": self.attention_unit,
            **{name: list(sizes) for name, sizes in self.sizes.items()},
            "layer_ranking": list(self.layer_ranking),
        }
        return values | {name: True for name in ("modulation", "compensation") if getattr(self, name)}

    @classmethod
    def from_dict(cls, model: ModelConfig, values: Mapping[str, Any]) -> ElasticSpace:
        """Build from plain types; null stands for the default of `build`. Raises FlextronError for a wrong key or value."""
        return cls.build(model, **{k: v for k, v in values.items() if v is not None})


def _layer(model: ModelConfig, attention_unit: str, sizes: Mapping[str, int]) -> LayerChoice:
    """Widths of an executed layer from the size of each layer axis.

    Args:
        model: architecture of the full model.
        attention_unit: kv_group or query_head, which decides how heads are divided into groups.
        sizes: {layer axis: size}.
    """
    fields: dict[str, int] = {}
    for name, size in sizes.items():
        fields |= zip(AXES[name].fields, AXES[name].split(model, attention_unit, size), strict=True)
    return LayerChoice.of(fields)


def count_parameters(model: ModelConfig, net: SubNetwork | None = None, embeddings: bool = True) -> int:
    """Exact number of parameters of a sub-network as a dense model.

    Args:
        model: architecture of the full model.
        net: sub-network, None for the full model.
        embeddings: count token and position embeddings and the output layer; false for the paper's "non-embedding" count.
    """
    return tensors.count(model, net or SubNetwork.full(model), embeddings, added_tensors())


def parameter_share(model: ModelConfig, net: SubNetwork) -> float:
    """Parameters of `net` as a share of the full model's, in 0..1."""
    return count_parameters(model, net) / count_parameters(model)


def weight_bytes(model: ModelConfig, net: SubNetwork | None = None, dtype: str = "bf16") -> int:
    """Bytes of the weights of a sub-network.

    Args:
        model: architecture of the full model.
        net: sub-network, None for the full model.
        dtype: fp32, bf16 or fp16.
    """
    return count_parameters(model, net) * DTYPE_BYTES[dtype]


def kv_cache_bytes(model: ModelConfig, net: SubNetwork | None, batch_size: int, length: int, dtype: str = "bf16") -> int:
    """Bytes of the KV cache of a sub-network.

    Args:
        model: architecture of the full model.
        net: sub-network, None for the full model.
        batch_size: number of sequences.
        length: tokens of each sequence; a sliding window keeps the last ones only.
        dtype: fp32, bf16 or fp16.
    """
    net = net or SubNetwork.full(model)
    held = sum(
        layer.kv_groups * min(length, window or length)
        for layer, window in zip(net.layers, model.windows, strict=True)
        if layer.executed
    )
    return 2 * held * model.kv_channels * batch_size * DTYPE_BYTES[dtype]
