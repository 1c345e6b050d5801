"""Translation between keys of Hugging Face's config.json and fields of ModelConfig, in both directions. No torch import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from flextron_mcore.config import MOST_LAYERS, ROPE_SCALING_KEYS, FlextronError, ModelConfig
from flextron_mcore.families.strictness import KINDS, original_positions, rope_parameters, shown

_REQUIRED = object()
_OF_TRAINING = ("init_method_std", "hidden_dropout", "attention_dropout")  # fields that do not change the function
_ROPE_KEYS = {**ROPE_SCALING_KEYS, "yarn": ROPE_SCALING_KEYS["yarn"] | {"mscale", "mscale_all_dim"}}
_ROPE_KEYS["longrope"] = ROPE_SCALING_KEYS["longrope"] | {"factor"}


class ConfigKey(Protocol):
    """Translator of one key of config.json, or of several that belong together, to fields of ModelConfig and back."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """{field of ModelConfig: value}, with transformers' default for an absent key that is not required; {} if it sets none.

        Raises FlextronError for an unsupported value, a wrong type, and a required key that is absent.
        """

    def write(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        """{key of config.json: value}. source: config.json that the model was imported from, or {}."""


@dataclass(frozen=True)
class Key:
    """Key of config.json that holds the value of one field of ModelConfig.

    Attributes:
        theirs: key of config.json.
        ours: field of ModelConfig.
        kind: type of the value in config.json.
        default: transformers' default for an absent key; left out: the key is required.
        names: {value in config.json: value of the field}; None: the values are equal.
        kept: True for a key that sets no field at import. An export writes the value of the imported config.json, or the value of
            the field if that has none.
        aliases: other names of the key that transformers accepts.
    """

    theirs: str
    ours: str
    kind: type
    default: Any = _REQUIRED
    names: Mapping[str, str] | None = None
    kept: bool = False
    aliases: tuple[str, ...] = ()

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """{field of ModelConfig: value}; {} for a kept key.

        Raises FlextronError for an unsupported value, a wrong type, and a required key that is absent.
        """
        if self.kept:
            value(config, self.theirs, self.kind, None)  # checked, because an export writes it
            return {}
        name = self._given(config)
        if self.default is not _REQUIRED and self.ours not in _OF_TRAINING:
            _check_null(config, name, self.default)
        found = value(config, name, self.kind, self.default)
        if self.names is not None and found not in self.names:
            raise FlextronError(f"{self.theirs}={shown(found)} is not supported: only {', '.join(self.names)}")
        return {self.ours: found if self.names is None else self.names[found]}

    def _given(self, config: Mapping[str, Any]) -> str:
        """Name under which config.json has the key. Raises FlextronError for two names with different values."""
        given = [name for name in (self.theirs, *self.aliases) if config.get(name) is not None] or [self.theirs]
        for name in given[1:]:
            if config[name] != config[given[0]]:
                raise FlextronError(
                    f"{given[0]}={config[given[0]]!r} and {name}={config[name]!r} are two names of one key: leave one of them"
                )
        return given[0]

    def write(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        """Entry of an exported config.json, {key: value}. source: config.json that the model was imported from, or {}.

        If several values in config.json mean the field's value (`names`), the value in `source` is kept if it is one of them,
        else the first is written. A `kept` key has the value in `source`, if there is one.
        """
        ours, given = getattr(model, self.ours), source.get(self.theirs)
        if self.names is None:
            return {self.theirs: given if self.kept and given is not None else ours}
        fitting = [name for name, means in self.names.items() if means == ours]
        return {self.theirs: given if given in fitting else fitting[0]}


@dataclass(frozen=True)
class Option:
    """Key of config.json with a single supported value, which needs no field of ModelConfig.

    Attributes:
        key: key of config.json.
        only: supported value; null is accepted as well, unless an export writes the key.
        written: True if an export writes the key.
        also: other spellings of the supported value.
    """

    key: str
    only: Any
    written: bool = False
    also: tuple[Any, ...] = ()

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Check the value and return {}. Raises FlextronError for a value that is not supported."""
        if self.written:
            _check_null(config, self.key, self.only)
        if config.get(self.key) not in (None, self.only, *self.also):
            raise FlextronError(f"{self.key}={config[self.key]!r} is not supported (only {self.only!r} is)")
        return {}

    def write(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        """Entry of an exported config.json: {key: only} if `written`, else {}. model, source: unused."""
        return {self.key: self.only} if self.written else {}


@dataclass(frozen=True)
class Rope:
    """Keys of rotary position embeddings (RoPE): base frequency, scaling and the rotated share of a head's channels.

    transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 has `rope_parameters` for both; an export writes all three.

    Attributes:
        theta: transformers' default of rope_theta.
        kinds: supported types of scaling, beside "default" (no scaling).
        partial: transformers' default of partial_rotary_factor; None for a family that rotates all channels of a head.
        renamed: {type of scaling: its present name}, for old names that transformers accepts.
        original: transformers' default of original_max_position_embeddings, which is then a key of config.json itself, not of the
            scaling; None: max_position_embeddings.
    """

    theta: float = 10000.0
    kinds: tuple[str, ...] = tuple(ROPE_SCALING_KEYS)
    partial: float | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    original: int | None = None

    @property
    def holds(self) -> tuple[str, ...]:
        """Fields of ModelConfig that the keys set, without rotary_base and rope_scaling, which every family has."""
        return () if self.partial is None else ("rotary_percent",)

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of ModelConfig, {"rotary_base", "rope_scaling"}, and "rotary_percent" for a family with partial rotation.

        Raises FlextronError for an unsupported or contradictory scaling.
        """
        name, rope, kind = rope_parameters(config, _ROPE_KEYS, self.renamed)
        if rope.get("rope_theta") is None:
            _check_null(config, "rope_theta", self.theta)
        found: dict[str, Any] = {"rotary_base": value(rope, "rope_theta", float, value(config, "rope_theta", float, self.theta))}
        if self.partial is None:
            for where in (config, rope):
                Option("partial_rotary_factor", 1.0).read(where)
        else:
            top = value(config, "partial_rotary_factor", float, self.partial)
            found["rotary_percent"] = value(rope, "partial_rotary_factor", float, top)
        if kind == "default":
            return found | {"rope_scaling": None}
        if kind not in self.kinds:
            raise FlextronError(f"{name} of type {kind!r} is not supported: only {', '.join(('default', *self.kinds))}")
        read = {"yarn": self._yarn, "longrope": self._longrope}.get(kind)
        return found | {"rope_scaling": read(config, rope) if read else self._scaling(config, rope, kind, name)}

    def _scaling(self, config: Mapping[str, Any], rope: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
        """Value of ModelConfig.rope_scaling for the types linear and llama3. Raises FlextronError if a key of the type is absent.

        Args:
            config: content of config.json.
            rope: rotary parameters in it.
            kind: type of the scaling.
            name: key that holds the rotary parameters, for the message.
        """
        scaling: dict[str, Any] = {"type": kind}
        for key in sorted(ROPE_SCALING_KEYS[kind]):
            if key == "original_max_position_embeddings":
                scaling[key] = original_positions(config, rope)
            elif key not in rope:
                raise FlextronError(f"{name} of type {kind} lacks '{key}'")
            else:
                scaling[key] = value(rope, key, float)
        return scaling

    def _yarn(self, config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
        """Value of ModelConfig.rope_scaling of type yarn, without absent keys, for which ModelConfig has defaults.

        Without attention_factor, mscale m and mscale_all_dim a give (0.1 m ln(factor) + 1) / (0.1 a ln(factor) + 1).
        """
        original = original_positions(config, rope)
        positions = value(config, "max_position_embeddings", int, original)
        factor = value(rope, "factor", float, positions / original)
        scaling = {"type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for key in ("beta_fast", "beta_slow", "attention_factor", "truncate"):
            if rope.get(key) is not None:
                scaling[key] = value(rope, key, bool if key == "truncate" else float)
        above, below = (value(rope, key, float, 0.0) for key in ("mscale", "mscale_all_dim"))
        if above and below and "attention_factor" not in scaling:
            log = 0.1 * math.log(max(factor, 1.0))
            scaling["attention_factor"] = (above * log + 1) / (below * log + 1)
        return scaling

    def _longrope(self, config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
        """Value of ModelConfig.rope_scaling of type longrope. ModelConfig checks it, and has defaults for absent keys."""
        if self.original is None:
            original = original_positions(config, rope)
        else:
            key = "original_max_position_embeddings"
            original = original_positions({key: config.get(key) or self.original}, {})
            if rope.get(key, original) != original:
                raise FlextronError(
                    f"{key} is {original} for config.json, and {rope[key]!r} for its rotary scaling: leave one of the two"
                )
        scaling = {"type": "longrope", "original_max_position_embeddings": original}
        for key in ("short_factor", "long_factor", "factor", "attention_factor"):
            if rope.get(key) is not None:
                scaling[key] = value(rope, key, list if key in ("short_factor", "long_factor") else float)
        return scaling

    def write(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        """Entries of an exported config.json: {"rope_theta", "rope_scaling", "rope_parameters"}.

        Also "partial_rotary_factor" for a family with partial rotation, and "original_max_position_embeddings" of LongRoPE, which
        transformers 4 reads in config.json itself, and of a family in which it is always there. That family's class in
        transformers 4 accepts a scaling with type and factors only.

        source: config.json that the model was imported from, or {}.
        """
        scaling = dict(model.rope_scaling or {"type": "default"})
        rope = {"rope_type": scaling.pop("type"), **scaling}
        old, key = rope, "original_max_position_embeddings"
        outside = {key: rope[key]} if rope["rope_type"] == "longrope" else {}
        if self.original is not None:
            outside = {key: rope.get(key, source.get(key) or self.original)}
            if rope["rope_type"] == "longrope" and model.rotary_scale == self._default_scale(model):
                rope = {name: rope[name] for name in ("rope_type", "short_factor", "long_factor")}
                old = {"type": "longrope", **{name: rope[name] for name in rope if name != "rope_type"}}
        partial = {} if self.partial is None else {"partial_rotary_factor": model.rotary_percent}
        return {
            "rope_theta": model.rotary_base,
            "rope_scaling": old if model.rope_scaling else None,
            "rope_parameters": {"rope_theta": model.rotary_base, **rope, **partial},
            **partial,
            **outside,
        }

    @staticmethod
    def _default_scale(model: ModelConfig) -> float:
        """Default of LongRoPE's attention_factor in the model."""
        given = {name: value for name, value in (model.rope_scaling or {}).items() if name != "attention_factor"}
        return replace(model, rope_scaling=given).rotary_scale


@dataclass(frozen=True)
class Window:
    """Key `sliding_window`: number of keys that a query attends to, its own included; null: all.

    default: transformers' default for an absent key.
    """

    default: int | None = None
    holds = ("sliding_window",)

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Field of ModelConfig, {"sliding_window": number of keys that a query attends to, or None for all}."""
        found = value(config, "sliding_window", int, None) if "sliding_window" in config else self.default
        return {"sliding_window": found}

    def write(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        """Entry of an exported config.json, {"sliding_window": keys that a query attends to; None: all}. source: unused."""
        return {"sliding_window": model.sliding_window}


@dataclass(frozen=True)
class LayerWindows:
    """Keys that give some layers a sliding window: `use_sliding_window`, `sliding_window`, `max_window_layers`, `layer_types`.

    Attributes:
        without_types: layers that have the window without `layer_types`: "last", from max_window_layers on (Qwen); "unrotated",
            those without rotary embedding (SmolLM3); "all" (Ministral, whose window needs no use_sliding_window).
        default: transformers' default for an absent sliding_window.
    """

    without_types: str = "last"
    default: int | None = 4096
    holds = ("sliding_window", "window_attn_skip_freq")

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of ModelConfig, {"sliding_window": tokens or None, "window_attn_skip_freq": for each layer 1 with it, else 0}.

        Raises FlextronError for layer_types of another length or with other names, and for a window that is not switched on.
        """
        window = value(config, "sliding_window", int, None) if "sliding_window" in config else self.default
        if self.without_types != "all" and not value(config, "use_sliding_window", bool, False):
            window = None
        layers = value(config, "num_hidden_layers", int)
        if config.get("layer_types") is not None:
            windowed = self._listed(value(config, "layer_types", list), layers, window)
        elif self.without_types == "unrotated":
            windowed = NoRope().read(config)["no_rope_freq"]
        else:
            first = value(config, "max_window_layers", int, 28) if self.without_types == "last" else 0
            windowed = tuple(int(number >= first) for number in range(min(layers, MOST_LAYERS)))
        if window is None or not any(windowed):
            return {"sliding_window": None, "window_attn_skip_freq": None}
        return {"sliding_window": window, "window_attn_skip_freq": windowed}

    def _listed(self, types: list[Any], layers: int, window: int | None) -> tuple[int, ...]:
        """For each of the `layers` entries of layer_types 1 if it is a window of `window` tokens, else 0."""
        unknown = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
        if unknown or len(types) != layers:
            found = f"with {', '.join(unknown)}" if unknown else f"of length {len(types)}"
            raise FlextronError(
                f"layer_types {found} is not supported: only full_attention or sliding_attention for each of the "
                f"{layers} layers (num_hidden_layers)"
            )
        if window is None and "sliding_attention" in types:
            raise FlextronError(
                "layer_types with sliding_attention needs a window: set use_sliding_window to true and sliding_window to its "
                "tokens in config.json, or layer_types to full_attention"
            )
        return tuple(int(kind == "sliding_attention") for kind in types)

    def write(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        """Entries of an exported config.json: {"use_sliding_window"}, and with windows {"sliding_window", "layer_types"}.

        Ministral has the last two only, and transformers wants its sliding_window even if no layer has one. source: unused.
        """
        types = ["full_attention" if window is None else "sliding_attention" for window in model.windows]
        if self.without_types == "all":
            return {"sliding_window": model.sliding_window or model.max_position_embeddings, "layer_types": types}
        if model.sliding_window is None:
            return {"use_sliding_window": False}
        return {"use_sliding_window": True, "sliding_window": model.sliding_window, "layer_types": types}


@dataclass(frozen=True)
class NoRope:
    """Keys of SmolLM3: `no_rope_layers` has 1 for a layer with rotary embedding and 0 for a layer without (despite its name)."""

    holds = ("no_rope_freq",)

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Field of ModelConfig, {"no_rope_freq": for each layer 1 without rotary embedding, else 0}.

        Without no_rope_layers, every no_rope_layer_interval-th layer has no rotary embedding.
        """
        layers, every = value(config, "num_hidden_layers", int), value(config, "no_rope_layer_interval", int, 4)
        if every < 1 or layers > MOST_LAYERS:
            raise FlextronError(
                f"layers without rope: an interval (no_rope_layer_interval) of {every} in {layers} layers is not possible"
            )
        given = value(config, "no_rope_layers", list, [int((i + 1) % every != 0) for i in range(layers)])
        return {"no_rope_freq": tuple(int(not rotated) for rotated in given[:layers])}

    def write(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        """Entry of an exported config.json, {"no_rope_layers": for each layer 1 with rotary embedding, else 0}.

        source: unused.
        """
        return {"no_rope_layers": [1 - skipped for skipped in model.no_rope_freq or (0,) * model.num_layers]}


def _check_null(config: Mapping[str, Any], key: str, default: Any) -> None:
    """Raise FlextronError for a key that is null although its default is not, nor false: transformers has no model for it.

    Args:
        config: content of config.json.
        key: name of the key.
        default: transformers' default for an absent key.
    """
    if default not in (None, False) and config.get(key, default) is None:
        raise FlextronError(f"{key}=null is not supported: leave the key out for transformers' default, {shown(default)}")


def value(config: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """Value of a key of config.json.

    Args:
        config: content of config.json, or a mapping in it.
        key: name of the key.
        kind: type of the value; for float, a whole number is accepted and converted.
        default: value for an absent or null key; left out: the key is required.

    Raises:
        FlextronError: a required key is absent, or the value has another type.
    """
    found = config.get(key)
    if found is None:
        if default is _REQUIRED:
            raise FlextronError(f"lacks '{key}'")
        return default
    if kind is float and type(found) is int:
        return float(found)
    if type(found) is not kind:
        raise FlextronError(f"{key} must be {KINDS[kind]}, not {shown(found)}")
    return found
