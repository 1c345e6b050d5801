"""Architecture of a GPT-style model, in the names of Megatron-Core and NeMo. No torch import.

Every checkpoint holds its `ModelConfig`. Parallel layout, training and logging are settings of a run instead (`conf/`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


class FlextronError(Exception):
    """Error of bad input. Its message is one line for the user: what is wrong, where, and what to do."""


class JobFailed(Exception):
    """Failure of a job that `flextron launch` started. Its message is one line for the user: which job, and its error."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Hint for a misspelt name, ` (did you mean 'x'?)`; empty if no known name is similar."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


MOST_LAYERS = 10_000
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "squared-relu", "swiglu", "geglu")
GATED_ACTIVATIONS = ("swiglu", "geglu")
NORMALIZATIONS = ("rmsnorm", "layernorm", "layernorm1p")
POSITION_EMBEDDINGS = ("rope", "learned_absolute")
ROPE_SCALING_KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"},
    "longrope": {"short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"},
}


# {field with a number for each layer: meaning of 1}
_OF_EACH_LAYER = {"no_rope_freq": "where heads are not rotated", "window_attn_skip_freq": "where a query sees the window only"}

LOGITS_AT_ONCE = 1 << 26  # 256 MiB in fp32; a loss with more logits is computed in chunks of the sequence
DEFAULT_LENGTH = 4096  # tokens; all positions of a model with 131,072 would take hundreds of GB for a micro-batch


def loss_chunk(length: int, batch: int, vocabulary: int) -> int:
    """Number of positions of a sequence whose logits are in memory at once in a loss: at most LOGITS_AT_ONCE logits of a rank.

    Args:
        length: tokens of a sample.
        batch: samples of a micro-batch.
        vocabulary: logits of a token on this rank.
    """
    return min(length, max(1, LOGITS_AT_ONCE // (batch * vocabulary)))


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only model. Raises FlextronError, naming the key, for values that do not fit each other.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: channels of the residual stream.
        num_attention_heads: query heads of a layer.
        vocab_size: tokens of the vocabulary.
        max_position_embeddings: longest sequence, in tokens.
        ffn_hidden_size: neurons of an MLP; by default 4 * hidden_size.
        num_query_groups: KV groups of GQA; by default num_attention_heads (MHA).
        kv_channels: channels of a head; by default hidden_size / num_attention_heads.
        activation: one of ACTIVATIONS; swiglu and geglu are gated.
        normalization: one of NORMALIZATIONS. layernorm1p has zero-centred scales.
        layernorm_epsilon: added to the variance.
        bias: linear layers and MLPs have biases.
        add_qkv_bias: the projections of queries, keys and values have biases, whatever `bias` is.
        qk_layernorm: each head's query and key is normalised by RMSNorm, with one scale for all heads.
        position_embedding_type: rope or learned_absolute.
        rotary_base: base of the rotary angles.
        rotary_percent: share of a head's channels, the first ones, that are rotated.
        rope_scaling: None, {"type": "linear", "factor"}, {"type": "llama3", "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings"}, {"type": "yarn", "factor", "original_max_position_embeddings"}, with optional
            beta_fast, beta_slow, attention_factor and truncate, or {"type": "longrope", "short_factor", "long_factor",
            "original_max_position_embeddings"}, with optional attention_factor and factor, from which it follows.
        no_rope_freq: for each layer 1 if its heads are not rotated, else 0; None if all layers rotate theirs.
        sliding_window: keys that a query sees, the last ones and its own included; None for all.
        window_attn_skip_freq: for each layer 1 if it has the sliding window, else 0; None if all layers have it.
        share_embeddings_and_output_weights: tie embedding and output layer.
        init_method_std: standard deviation of initial weights.
        hidden_dropout, attention_dropout: dropout probabilities in training.

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
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)  # a dictionary has no hash
    no_rope_freq: tuple[int, ...] | None = None
    sliding_window: int | None = None
    window_attn_skip_freq: tuple[int, ...] | None = None
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
                    f"model.num_attention_heads={self.num_attention_heads}: set the size of one head, model.kv_channels "
                    "(head_dim in config.json)"
                )
            put("kv_channels", self.hidden_size // self.num_attention_heads)
        for name in ("ffn_hidden_size", "num_query_groups", "kv_channels"):
            _check_positive_int(name, getattr(self, name))
        if self.num_attention_heads % self.num_query_groups:
            raise FlextronError(
                f"model.num_attention_heads={self.num_attention_heads} is not divisible by "
                f"model.num_query_groups={self.num_query_groups}: choose one that divides it"
            )
        if self.qk_layernorm and self.normalization != "rmsnorm":
            raise FlextronError(f"model.qk_layernorm=true needs model.normalization=rmsnorm (it is {self.normalization})")
        for name, meaning in _OF_EACH_LAYER.items():
            values = getattr(self, name)
            if values is None:
                continue
            put(name, tuple(values))
            if len(values) != self.num_layers or set(values) - {0, 1}:
                raise FlextronError(
                    f"model.{name}={list(values)} must be one number, 0 or 1, for each of the {self.num_layers} layers: 1 "
                    f"{meaning}"
                )
        if self.no_rope_freq is not None and not any(self.no_rope_freq):
            put("no_rope_freq", None)
        if self.sliding_window is not None:
            _check_positive_int("sliding_window", self.sliding_window)
        if self.window_attn_skip_freq is not None:
            if self.sliding_window is None:
                raise FlextronError("model.window_attn_skip_freq needs a window: set model.sliding_window, in tokens")
            if not any(self.window_attn_skip_freq):
                put("sliding_window", None)
            if len(set(self.window_attn_skip_freq)) == 1:
                put("window_attn_skip_freq", None)
        if not 0 < self.rotary_percent <= 1:
            raise FlextronError(f"model.rotary_percent={self.rotary_percent} must be above 0 and at most 1")
        if self.position_embedding_type == "rope" and (self.rotary_channels % 2 or not self.rotary_channels):
            share = f" x model.rotary_percent={self.rotary_percent}" if self.rotary_percent < 1 else ""
            raise FlextronError(
                f"model.kv_channels={self.kv_channels}{share} is odd: rotary embeddings need an even number of channels"
            )
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("normalization", self.normalization, NORMALIZATIONS)
        _check_choice("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDINGS)
        for name, zero in (("layernorm_epsilon", False), ("rotary_base", False), ("init_method_std", True)):
            _check_number(name, getattr(self, name), 0, least_excluded=not zero)
        for name in ("hidden_dropout", "attention_dropout"):
            _check_number(name, getattr(self, name), 0, 1)
        if self.rope_scaling is not None:
            scaling = dict(self.rope_scaling)
            kind = scaling.get("type", "")
            _check_choice("rope_scaling.type", kind, tuple(ROPE_SCALING_KEYS))
            if kind == "yarn":
                scaling = _yarn_defaults(scaling)
            if kind == "longrope":
                scaling = self._longrope(scaling)
            missing = ROPE_SCALING_KEYS[kind] - scaling.keys()
            if missing:
                raise FlextronError(f"model.rope_scaling of type {kind} lacks {', '.join(sorted(missing))}")
            for name, number in scaling.items():
                if name not in ("type", "truncate", "short_factor", "long_factor") and number is not None:
                    _check_number(f"rope_scaling.{name}", number, 0, least_excluded=True)
            put("rope_scaling", scaling)

    @property
    def gated(self) -> bool:
        """True if fc1 holds a gate and an up projection of equal size (SwiGLU, GeGLU)."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def default_length(self) -> int:
        """Length in tokens of a sample, prompt or KV cache that no key sets: max_position_embeddings, at most DEFAULT_LENGTH."""
        return min(self.max_position_embeddings, DEFAULT_LENGTH)

    @property
    def query_heads_per_group(self) -> int:
        """Number of query heads that share one key and value head; 1 for MHA."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def qkv_bias(self) -> bool:
        """True if the projections of queries, keys and values have biases."""
        return self.bias or self.add_qkv_bias

    @property
    def rotary_channels(self) -> int:
        """Number of a head's channels that are rotated, the first ones."""
        return int(self.kv_channels * self.rotary_percent)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer the number of keys that a query sees; None for all."""
        return tuple(self.sliding_window if has else None for has in self.window_attn_skip_freq or (1,) * self.num_layers)

    @property
    def rotary_scale(self) -> float:
        """Factor of the cosines and sines of the rotary embedding: attention_factor of YaRN and LongRoPE, else 1."""
        return float((self.rope_scaling or {}).get("attention_factor", 1.0))

    @property
    def short_context(self) -> int | None:
        """Tokens of the longest sequence that has the short factors of LongRoPE; None for a model without LongRoPE."""
        scaling = self.rope_scaling or {}
        return int(scaling["original_max_position_embeddings"]) if scaling.get("type") == "longrope" else None

    def _longrope(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """LongRoPE scaling without `factor`, with transformers' default of attention_factor.

        Without attention_factor, a factor f (by default max_position_embeddings / original_max_position_embeddings) above 1
        gives sqrt(1 + ln(f) / ln(original_max_position_embeddings)). Raises FlextronError for lists of factors that do not have
        a positive number for each pair of rotated channels.
        """
        scaling = {key: value for key, value in given.items() if value is not None}
        pairs, factor = self.rotary_channels // 2, scaling.pop("factor", None)
        for name in ("short_factor", "long_factor"):
            values = scaling.get(name)
            if values is None:
                continue  # refused with the other missing keys
            if not isinstance(values, list | tuple) or len(values) != pairs:
                shown = f"{len(values)} numbers" if isinstance(values, list | tuple) else repr(values)
                raise FlextronError(
                    f"model.rope_scaling.{name} must be a list of {pairs} numbers, one a pair of rotated channels, not {shown}"
                )
            for number, value in enumerate(values):
                _check_number(f"rope_scaling.{name}[{number}]", value, 0, least_excluded=True)
            scaling[name] = [float(value) for value in values]
        original = scaling.get("original_max_position_embeddings")
        if original is None or "attention_factor" in scaling:
            return scaling
        _check_number("rope_scaling.original_max_position_embeddings", original, 1, least_excluded=True)
        if factor is not None:
            _check_number("rope_scaling.factor", factor, 0, least_excluded=True)
        factor = self.max_position_embeddings / original if factor is None else factor
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return scaling | {"attention_factor": attention}

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON and YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build from the plain types of `to_dict`. Raises FlextronError for an unknown or missing key, and for a wrong value."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise FlextronError(f"unknown model key '{name}'{nearest(name, known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise FlextronError(f"model config is incomplete: {error}") from None


def _yarn_defaults(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN scaling with transformers' defaults for absent and null keys (attention_factor from eq. 15 of the YaRN paper)."""
    given = {key: value for key, value in scaling.items() if value is not None}
    factor = given.get("factor", 1.0)
    attention = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": attention, "truncate": True, **given}


def _check_positive_int(name: str, value: object) -> None:
    """Raise FlextronError unless a field is a positive whole number of a possible size."""
    most = MOST_LAYERS if name == "num_layers" else 2**31 - 1
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FlextronError(f"model.{name} must be a whole number of at least 1, not {value!r}")
    if value > most:
        raise FlextronError(f"model.{name}={value} is more than {most}, the most that is possible")


def _check_number(name: str, value: object, least: float, below: float = math.inf, least_excluded: bool = False) -> None:
    """Raise FlextronError unless a field is a number from `least` to less than `below`.

    Args:
        name: field, or key of rope_scaling.
        value: its value.
        least, below: the range.
        least_excluded: `least` itself is not allowed.
    """
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < below
    if not fits or least_excluded and value == least:
        more = "more than" if least_excluded else "at least"
        end = "" if below == math.inf else f" and less than {below:g}"
        raise FlextronError(f"model.{name} must be a number of {more} {least:g}{end}, not {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise FlextronError unless a field has one of the values in `choices`."""
    if value not in choices:
        raise FlextronError(f"model.{name}={value!r} is not known: use one of {', '.join(choices)}")
