"""The architecture of a GPT-style model, in Megatron-Core's and NeMo's names. No torch import.

`ModelConfig` says what the model *is* (it travels inside every checkpoint); how a run is laid out over ranks, trained and logged
is the run's own configuration (`conf/`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


class FlextronError(Exception):
    """Bad input. The message is one line for the user: what is wrong, where, and what to do."""


class JobFailed(Exception):
    """A command that this one started did not succeed. The message is one line for the user: which, and what it said."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ` (did you mean 'x'?)`, or the empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "squared-relu", "swiglu", "geglu")
GATED_ACTIVATIONS = ("swiglu", "geglu")
NORMALIZATIONS = ("rmsnorm", "layernorm", "layernorm1p")
POSITION_EMBEDDINGS = ("rope", "learned_absolute")
ROPE_SCALING_KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only model.

    Sizes are in units (layers, channels, heads). `num_query_groups` defaults to `num_attention_heads` (MHA), `kv_channels`
    (size of one head) to `hidden_size / num_attention_heads`, `ffn_hidden_size` to `4 * hidden_size`.
    `rope_scaling` is `None`, `{"type": "linear", "factor": f}` or `{"type": "llama3", "factor": ..., "low_freq_factor": ...,
    "high_freq_factor": ..., "original_max_position_embeddings": ...}`.

    >>> model = ModelConfig(
    ...     num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=67, max_position_embeddings=24, ffn_hidden_size=48
    ... )
    >>> model.kv_channels, model.gated
    (8, True)
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    activation: str = "swiglu"
    normalization: str = "rmsnorm"
    layernorm_epsilon: float = 1e-5
    bias: bool = False
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)  # a dictionary has no hash
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen dataclass)
        for name in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"):
            _check_positive_int(name, getattr(self, name))
        if self.ffn_hidden_size is None:
            put("ffn_hidden_size", 4 * self.hidden_size)
        if self.num_query_groups is None:
            put("num_query_groups", self.num_attention_heads)
        if self.kv_channels is None:
            if self.hidden_size % self.num_attention_heads:
                raise FlextronError(
                    f"model.hidden_size={self.hidden_size} is not divisible by "
                    f"model.num_attention_heads={self.num_attention_heads}: set model.kv_channels (the size of one head)"
                )
            put("kv_channels", self.hidden_size // self.num_attention_heads)
        for name in ("ffn_hidden_size", "num_query_groups", "kv_channels"):
            _check_positive_int(name, getattr(self, name))
        if self.num_attention_heads % self.num_query_groups:
            raise FlextronError(
                f"model.num_attention_heads={self.num_attention_heads} is not divisible by "
                f"model.num_query_groups={self.num_query_groups}"
            )
        if self.position_embedding_type == "rope" and self.kv_channels % 2:
            raise FlextronError(f"model.kv_channels={self.kv_channels} is odd: rotary embeddings need an even head size")
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("normalization", self.normalization, NORMALIZATIONS)
        _check_choice("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDINGS)
        if self.rope_scaling is not None:
            scaling = dict(self.rope_scaling)
            kind = scaling.get("type")
            _check_choice("rope_scaling.type", kind, tuple(ROPE_SCALING_KEYS))
            missing = ROPE_SCALING_KEYS[kind] - scaling.keys()
            if missing:
                raise FlextronError(f"model.rope_scaling of type {kind} lacks {', '.join(sorted(missing))}")
            put("rope_scaling", scaling)

    @property
    def gated(self) -> bool:
        """True if fc1 holds a gate and an up projection of equal size (SwiGLU, GeGLU)."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def query_heads_per_group(self) -> int:
        """Query heads that share one key and value head (1 for MHA)."""
        return self.num_attention_heads // self.num_query_groups

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON and YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build from plain types. Raises FlextronError on an unknown or missing name."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise FlextronError(f"unknown model key '{name}'{nearest(name, known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise FlextronError(f"model config is incomplete: {error}") from None


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FlextronError(f"model.{name} must be a whole number of at least 1, not {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise FlextronError(f"model.{name}={value!r} is not known: use one of {', '.join(choices)}")
