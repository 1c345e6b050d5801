"""Keys of Hugging Face's config.json and the values of ModelConfig that they hold, in both directions. No torch import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flextron_mcore.config import ROPE_SCALING_KEYS, FlextronError, ModelConfig

_REQUIRED = object()


class ConfigKey(Protocol):
    """One key of config.json, or several that belong together."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Values of ModelConfig, where `config` leaves one out transformers' default. Raises FlextronError."""

    def write(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of config.json; source: the config.json that the model was imported from, or {}."""


@dataclass(frozen=True)
class Key:
    """A key that holds one value of ModelConfig.

    names: transformers' values -> ours, where they differ; of several for one of ours the source's, else the first, is written.
    kept: Megatron-Core has no such value; the source's is written, else ours.
    """

    theirs: str
    ours: str
    kind: type
    default: Any = _REQUIRED
    names: Mapping[str, str] | None = None
    kept: bool = False

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if self.kept:
            return {}
        found = value(config, self.theirs, self.kind, self.default)
        if self.names is not None and found not in self.names:
            raise FlextronError(f"{self.theirs}={found!r} is not supported: only {', '.join(self.names)}")
        return {self.ours: found if self.names is None else self.names[found]}

    def write(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        ours, given = getattr(model, self.ours), source.get(self.theirs)
        if self.names is None:
            return {self.theirs: given if self.kept and given is not None else ours}
        fitting = [name for name, means in self.names.items() if means == ours]
        return {self.theirs: given if given in fitting else fitting[0]}


@dataclass(frozen=True)
class Option:
    """A key with only one value that Megatron-Core computes. written: an export says it."""

    key: str
    only: Any
    written: bool = False

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config.get(self.key) not in (None, self.only):
            raise FlextronError(f"{self.key}={config[self.key]!r} is not supported (only {self.only!r} is)")
        return {}

    def write(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        return {self.key: self.only} if self.written else {}


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    transformers 4 has `rope_theta` and `rope_scaling`, 5 has all of it in `rope_parameters`; both are written.
    """

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        rope = value(config, name, dict, {})
        theta = value(rope, "rope_theta", float, value(config, "rope_theta", float, 10000.0))
        for where in (config, rope):
            Option("partial_rotary_factor", 1.0).read(where)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "default":
            return {"rotary_base": theta, "rope_scaling": None}
        if kind not in ROPE_SCALING_KEYS:
            raise FlextronError(f"{name} of type {kind!r} is not supported: only default, {', '.join(ROPE_SCALING_KEYS)}")
        scaling: dict[str, Any] = {"type": kind}
        for key in sorted(ROPE_SCALING_KEYS[kind]):
            if key not in rope:
                raise FlextronError(f"{name} of type {kind} lacks '{key}'")
            scaling[key] = value(rope, key, int if key == "original_max_position_embeddings" else float)
        return {"rotary_base": theta, "rope_scaling": scaling}

    def write(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        scaling = dict(model.rope_scaling or {"type": "default"})
        rope = {"rope_type": scaling.pop("type"), **scaling}
        return {
            "rope_theta": model.rotary_base,
            "rope_scaling": rope if model.rope_scaling else None,
            "rope_parameters": {"rope_theta": model.rotary_base, **rope},
        }


def value(config: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """`config[key]` of type `kind` (int counts as float); `default` where it is absent or null. Raises FlextronError."""
    found = config.get(key)
    if found is None:
        if default is _REQUIRED:
            raise FlextronError(f"lacks '{key}'")
        return default
    if kind is float and type(found) is int:
        return float(found)
    if type(found) is not kind:
        raise FlextronError(f"{key} must be of type {kind.__name__}, not {found!r}")
    return found
