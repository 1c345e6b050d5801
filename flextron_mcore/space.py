"""What may vary (ElasticSpace), what was chosen (SubNetwork), and what a choice costs in parameters and bytes.

Source: Flextron (ICML 2024), section 2, eq. 1-2; hidden size and depth from LLaMaFlex (ICLR 2025). No torch import.
A candidate always uses the *first* units of an axis, so sub-networks are nested.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig, nearest
from flextron_mcore.families import tensors

ATTENTION_UNITS = ("kv_group", "query_head")
AUTOMATIC_GRANULARITIES = (8, 4, 2, 1)
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class LayerChoice:
    """Widths of one layer. `kv_groups` groups of `query_heads_per_group` query heads each; `ffn_hidden_size` neurons."""

    executed: bool
    kv_groups: int
    query_heads_per_group: int
    ffn_hidden_size: int

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the layer."""
        return self.kv_groups * self.query_heads_per_group


SKIPPED = LayerChoice(False, 0, 0, 0)


@dataclass(frozen=True)
class SubNetwork:
    """The complete choice of one sub-network: hidden size, and the widths of every layer."""

    hidden_size: int
    layers: tuple[LayerChoice, ...]

    @classmethod
    def full(cls, model: ModelConfig) -> SubNetwork:
        """The whole model."""
        choice = LayerChoice(True, model.num_query_groups, model.query_heads_per_group, model.ffn_hidden_size)
        return cls(model.hidden_size, (choice,) * model.num_layers)

    @property
    def is_uniform(self) -> bool:
        """Whether all executed layers have the same widths (such a network is a stock dense model)."""
        return len({layer for layer in self.layers if layer.executed}) <= 1

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"hidden_size": self.hidden_size, "layers": [asdict(layer) for layer in self.layers]}

    def to_json(self) -> str:
        """One layer a line."""
        rows = ",\n".join("  " + json.dumps(asdict(layer)) for layer in self.layers)
        return f'{{"hidden_size": {self.hidden_size}, "layers": [\n{rows}\n]}}\n'

    @classmethod
    def from_dict(cls, values: Any, where: str = "sub-network") -> SubNetwork:
        """Read the plain form. Raises FlextronError naming `where` and what is wrong."""
        if not isinstance(values, Mapping) or "hidden_size" not in values or not isinstance(values.get("layers"), Sequence):
            raise FlextronError(f"{where}: expected an object with 'hidden_size' and a list 'layers'")
        known = list(LayerChoice.__dataclass_fields__)
        layers = []
        for i, row in enumerate(values["layers"]):
            if not isinstance(row, Mapping):
                raise FlextronError(f"{where}: layers[{i}] is not an object with the keys {', '.join(known)}")
            for name in row:
                if name not in known:
                    raise FlextronError(f"{where}: layers[{i}] has the unknown key '{name}'{nearest(name, known)}")
            for name in known:
                if name not in row:
                    raise FlextronError(f"{where}: layers[{i}] lacks '{name}'")
                wanted = bool if name == "executed" else int
                if type(row[name]) is not wanted:
                    raise FlextronError(f"{where}: layers[{i}].{name} must be of type {wanted.__name__}, not {row[name]!r}")
            layers.append(LayerChoice(**row))
        if type(values["hidden_size"]) is not int:
            raise FlextronError(f"{where}: hidden_size must be of type int, not {values['hidden_size']!r}")
        return cls(values["hidden_size"], tuple(layers))

    @classmethod
    def from_file(cls, path: str | Path) -> SubNetwork:
        """Read a JSON file. Raises FlextronError naming the file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FlextronError(f"{path}: no such file") from None
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise FlextronError(f"{path}: not readable as JSON: {error}") from None
        return cls.from_dict(values, str(path))


@dataclass(frozen=True)
class ElasticSpace:
    """Candidates of every axis, as absolute sizes in increasing order; the last one is the full size.

    heads: query heads per layer in total. With `attention_unit` `kv_group`, whole groups are dropped; with `query_head`, every
        group stays and loses query heads.
    granularity: the largest tensor-parallel size ever to be used; it divides every candidate of FFN width and, with `kv_group`,
        every number of groups (checkpoint/sharding.py).
    hidden_size: channels of the residual stream, one choice for the whole network. depth: numbers of executed layers.
    layer_ranking: the layers, most important first: a network of depth d executes the first d of them (`executed`).
    modulation: whether blocks have gains that depend on the network (layers/modulation.py). It changes no network's sizes, so
        tables and routers of a space serve it with and without.
    """

    granularity: int
    attention_unit: str
    heads: tuple[int, ...]
    ffn_hidden_size: tuple[int, ...]
    hidden_size: tuple[int, ...]
    depth: tuple[int, ...]
    layer_ranking: tuple[int, ...]
    modulation: bool = field(default=False, compare=False)

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        granularity: int | None = None,
        attention_unit: str | None = None,
        heads: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        ffn_hidden_size: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        hidden_size: Sequence[float] = (1.0,),
        depth: Sequence[float] = (1.0,),
        layer_ranking: Sequence[int] | None = None,
        modulation: bool = False,
    ) -> ElasticSpace:
        """Resolve fractions (floats in (0, 1]) and integers (sizes) against `model`.

        layer_ranking None: the order of the model, until `flextron importance` ranks them. granularity None: 8, or where that
        does not divide every candidate the largest of 4, 2, 1 that does. attention_unit None: kv_group where the candidates are
        whole groups, else query_head. Raises FlextronError for a candidate that is out of range or does not divide; the full size
        is added where it is missing.
        """
        if granularity is None or attention_unit is None:
            axes = heads, ffn_hidden_size, hidden_size, depth, layer_ranking, modulation
            first_error: FlextronError | None = None
            for unit in ATTENTION_UNITS if attention_unit is None else (attention_unit,):
                for size in AUTOMATIC_GRANULARITIES if granularity is None else (granularity,):
                    try:
                        return cls.build(model, size, unit, *axes)
                    except FlextronError as error:
                        failed = error
                first_error = first_error or failed
            raise first_error
        if isinstance(granularity, bool) or not isinstance(granularity, int) or granularity < 1:
            raise FlextronError(f"space.granularity must be a whole number of at least 1, not {granularity!r}")
        if attention_unit not in ATTENTION_UNITS:
            raise FlextronError(f"space.attention_unit={attention_unit!r} is not known: use one of {', '.join(ATTENTION_UNITS)}")
        ranking = tuple(range(model.num_layers)) if layer_ranking is None else tuple(layer_ranking)
        if sorted(ranking) != list(range(model.num_layers)):
            raise FlextronError(
                f"space.layer_ranking={list(ranking)}: must hold each of the layers 0..{model.num_layers - 1} once"
            )
        if not isinstance(modulation, bool):
            raise FlextronError(f"space.modulation={modulation!r} is neither true nor false")
        if attention_unit == "kv_group":
            step, why = granularity * model.query_heads_per_group, f"granularity {granularity}"
            if model.query_heads_per_group > 1:
                why += f" x {model.query_heads_per_group} query heads per KV group"
        else:
            step, why = model.num_query_groups, f"the number of KV groups, {model.num_query_groups}"
        return cls(
            granularity,
            attention_unit,
            _candidates("heads", heads, model.num_attention_heads, step, why),
            _candidates("ffn_hidden_size", ffn_hidden_size, model.ffn_hidden_size, granularity, f"granularity {granularity}"),
            _candidates(
                "hidden_size",
                hidden_size,
                model.hidden_size,
                1,
                "1",
            ),
            _candidates("depth", depth, model.num_layers, 1, "1"),
            ranking,
            modulation,
        )

    def layer_choice(self, model: ModelConfig, heads: int, ffn_hidden_size: int) -> LayerChoice:
        """The LayerChoice with `heads` query heads in total and `ffn_hidden_size` neurons."""
        if self.attention_unit == "kv_group":
            groups, per_group = heads // model.query_heads_per_group, model.query_heads_per_group
        else:
            groups, per_group = model.num_query_groups, heads // model.num_query_groups
        return LayerChoice(True, groups, per_group, ffn_hidden_size)

    def uniform(
        self, model: ModelConfig, heads: int, ffn_hidden_size: int, hidden_size: int | None = None, depth: int | None = None
    ) -> SubNetwork:
        """The sub-network with the same widths in every layer; None for all channels, all layers."""
        choices = (self.layer_choice(model, heads, ffn_hidden_size),) * model.num_layers
        return self.network(model, choices, hidden_size, depth)

    def network(
        self, model: ModelConfig, choices: Sequence[LayerChoice], hidden_size: int | None = None, depth: int | None = None
    ) -> SubNetwork:
        """The sub-network of these widths, of which only the `depth` most important layers are executed; None for all."""
        kept = set(self.layer_ranking[:depth])
        layers = tuple(choice if i in kept else SKIPPED for i, choice in enumerate(choices))
        return SubNetwork(hidden_size or model.hidden_size, layers)

    def check(self, model: ModelConfig, net: SubNetwork, where: str = "sub-network") -> None:
        """Raise FlextronError unless `net` is a member of this space."""
        if len(net.layers) != model.num_layers:
            raise FlextronError(f"{where}: has {len(net.layers)} layers, the model has {model.num_layers}")
        if net.hidden_size not in self.hidden_size:
            raise FlextronError(
                f"{where}: hidden_size {net.hidden_size} is not a candidate {list(self.hidden_size)} of this space"
            )
        if sum(layer.executed for layer in net.layers) not in self.depth:
            executed = sum(layer.executed for layer in net.layers)
            raise FlextronError(f"{where}: {executed} executed layers are not a candidate {list(self.depth)} of this space")
        for i, layer in enumerate(net.layers):
            if not layer.executed:
                continue  # it has no widths
            if layer.ffn_hidden_size not in self.ffn_hidden_size:
                raise FlextronError(
                    f"{where}: layers[{i}].ffn_hidden_size {layer.ffn_hidden_size} is not a candidate "
                    f"{list(self.ffn_hidden_size)} of this space"
                )
            allowed = [self.layer_choice(model, h, layer.ffn_hidden_size) for h in self.heads]
            if not any((layer.kv_groups, layer.query_heads_per_group) == (a.kv_groups, a.query_heads_per_group) for a in allowed):
                pairs = ", ".join(f"{a.kv_groups} x {a.query_heads_per_group}" for a in allowed)
                raise FlextronError(
                    f"{where}: layers[{i}] has {layer.kv_groups} KV groups x {layer.query_heads_per_group} query heads, "
                    f"not a candidate ({pairs}) of this space (attention_unit {self.attention_unit})"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON and YAML; `modulation` only where there is some."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not False}

    @classmethod
    def from_dict(cls, model: ModelConfig, values: Mapping[str, Any]) -> ElasticSpace:
        """Build from plain types (fractions or sizes). Raises FlextronError on an unknown name."""
        known = list(cls.__dataclass_fields__)
        for name in values:
            if name not in known:
                raise FlextronError(f"unknown key 'space.{name}'{nearest(name, known)}")
        return cls.build(model, **{k: v for k, v in values.items() if v is not None})


def _candidates(axis: str, values: Sequence[float], full: int, step: int, why: str) -> tuple[int, ...]:
    """Absolute sizes, increasing, each a multiple of `step`, the last one `full`."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not values:
        raise FlextronError(f"space.{axis} must be a list of fractions or sizes, not {values!r}")
    sizes = {full}
    if any(isinstance(value, float) for value in values):  # YAML writes the whole as 1 or 1.0; among fractions both mean all
        values = [1.0 if value == 1 and not isinstance(value, bool) else value for value in values]
    for value in [*values, full]:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FlextronError(f"space.{axis}: {value!r} is neither a fraction nor a size")
        size = value if isinstance(value, int) else value * full
        shown = f"{value}" if isinstance(value, int) else f"{value:g} x {full} = {size:g}"
        if not 0 < size <= full:
            raise FlextronError(f"space.{axis}: {shown} is not within 1..{full}")
        if abs(size - round(size)) > 1e-6 or round(size) % step:
            below = int(size // step) * step
            nearby = [str(s) for s in (below, below + step) if 0 < s <= full and s % step == 0 and full % step == 0]
            hint = f"; nearest: {' or '.join(nearby)}" if nearby else "; choose a smaller space.granularity"
            if full % step:
                shown = f"the full size {full}"
            wanted = "a whole number" if step == 1 else f"a multiple of {step} ({why})"
            raise FlextronError(f"space.{axis}: {shown} is not {wanted}{hint}")
        sizes.add(round(size))
    return tuple(sorted(sizes))


def count_parameters(model: ModelConfig, net: SubNetwork | None = None, embeddings: bool = True) -> int:
    """Exact number of parameters of `net` (default: the full model) as a dense model.

    embeddings=False leaves out token and position embeddings and the output layer (the paper's "non-embedding" count).
    """
    return tensors.count(model, net or SubNetwork.full(model), embeddings)


def parameter_share(model: ModelConfig, net: SubNetwork) -> float:
    """What `net` has of the full model's parameters, 0..1."""
    return count_parameters(model, net) / count_parameters(model)


def weight_bytes(model: ModelConfig, net: SubNetwork | None = None, dtype: str = "bf16") -> int:
    """Bytes of the weights of `net` in `dtype` (fp32, bf16, fp16)."""
    return count_parameters(model, net) * DTYPE_BYTES[dtype]


def kv_cache_bytes(model: ModelConfig, net: SubNetwork | None, batch_size: int, length: int, dtype: str = "bf16") -> int:
    """Bytes of keys and values of `net` for `batch_size` sequences of `length` tokens."""
    net = net or SubNetwork.full(model)
    groups = sum(layer.kv_groups for layer in net.layers if layer.executed)
    return 2 * groups * model.kv_channels * batch_size * length * DTYPE_BYTES[dtype]
