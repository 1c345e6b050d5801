"""Llama 2 and 3, and what shares their architecture: LlamaForCausalLM of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from flextron_mcore.checkpoint.hf_import.common import Family, Recipe, require, value
from flextron_mcore.config import ROPE_SCALING_KEYS, FlextronError, ModelConfig


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a LlamaConfig; where it leaves a value out, transformers' default. `pretraining_tp` changes no result."""
    require(config, "hidden_act", "silu")
    attention_bias, mlp_bias = (value(config, key, bool, False) for key in ("attention_bias", "mlp_bias"))
    if attention_bias != mlp_bias:
        raise FlextronError(
            f"attention_bias={attention_bias} with mlp_bias={mlp_bias} is not supported: biases are everywhere or nowhere"
        )
    theta, scaling = _rope(config)
    heads = value(config, "num_attention_heads", int)
    return ModelConfig(
        num_layers=value(config, "num_hidden_layers", int),
        hidden_size=value(config, "hidden_size", int),
        num_attention_heads=heads,
        vocab_size=value(config, "vocab_size", int),
        max_position_embeddings=value(config, "max_position_embeddings", int, 2048),
        ffn_hidden_size=value(config, "intermediate_size", int),
        num_query_groups=value(config, "num_key_value_heads", int, heads),
        kv_channels=value(config, "head_dim", int, None),
        activation="swiglu",
        normalization="rmsnorm",
        layernorm_epsilon=value(config, "rms_norm_eps", float, 1e-6),
        bias=attention_bias,
        position_embedding_type="rope",
        rotary_base=theta,
        rope_scaling=scaling,
        share_embeddings_and_output_weights=value(config, "tie_word_embeddings", bool, False),
        init_method_std=value(config, "initializer_range", float, 0.02),
        attention_dropout=value(config, "attention_dropout", float, 0.0),
    )


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling or None). transformers 4 has `rope_theta` and `rope_scaling`, 5 has all of it in `rope_parameters`."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = value(config, name, dict, {})
    theta = value(rope, "rope_theta", float, value(config, "rope_theta", float, 10000.0))
    for where in (config, rope):
        require(where, "partial_rotary_factor", 1.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in ROPE_SCALING_KEYS:
        raise FlextronError(f"{name} of type {kind!r} is not supported: only default, {', '.join(ROPE_SCALING_KEYS)}")
    scaling: dict[str, Any] = {"type": kind}
    for key in sorted(ROPE_SCALING_KEYS[kind]):
        if key not in rope:
            raise FlextronError(f"{name} of type {kind} lacks '{key}'")
        scaling[key] = value(rope, key, int if key == "original_max_position_embeddings" else float)
    return theta, scaling


def recipes(model: ModelConfig) -> dict[str, Recipe]:
    """Megatron-Core name -> Recipe, in the order of the network."""
    vocabulary, channels, ffn = model.vocab_size, model.hidden_size, model.ffn_hidden_size
    queries, groups = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels

    def qkv(*parts: torch.Tensor) -> torch.Tensor:
        """Query, key and value, whole or biases -> group after group its query heads, its key, its value."""
        grouped = [part.unflatten(0, (model.num_query_groups, -1)) for part in parts]
        return torch.cat(grouped, 1).flatten(0, 1)

    def stack(*parts: torch.Tensor) -> torch.Tensor:
        return torch.cat(parts)

    norm = (channels,)
    found = {"embedding.word_embeddings.weight": _same("model.embed_tokens.weight", (vocabulary, channels))}
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        found[ours + "self_attention.linear_qkv.layer_norm_weight"] = _same(theirs + "input_layernorm.weight", norm)
        found[ours + "mlp.linear_fc1.layer_norm_weight"] = _same(theirs + "post_attention_layernorm.weight", norm)
        for kind, columns in (("weight", (channels,)), ("bias", ())):
            if kind == "bias" and not model.bias:
                break
            rows = {"q_proj": queries, "k_proj": groups, "v_proj": groups}
            found[f"{ours}self_attention.linear_qkv.{kind}"] = Recipe(
                (queries + 2 * groups, *columns), {f"{attention}{n}.{kind}": (r, *columns) for n, r in rows.items()}, qkv
            )
            found[f"{ours}mlp.linear_fc1.{kind}"] = Recipe(
                (2 * ffn, *columns), {f"{mlp}{n}.{kind}": (ffn, *columns) for n in ("gate_proj", "up_proj")}, stack
            )
        found[ours + "self_attention.linear_proj.weight"] = _same(attention + "o_proj.weight", (channels, queries))
        found[ours + "mlp.linear_fc2.weight"] = _same(mlp + "down_proj.weight", (channels, ffn))
        if model.bias:
            found[ours + "self_attention.linear_proj.bias"] = _same(attention + "o_proj.bias", norm)
            found[ours + "mlp.linear_fc2.bias"] = _same(mlp + "down_proj.bias", norm)
    found["decoder.final_layernorm.weight"] = _same("model.norm.weight", norm)
    if not model.share_embeddings_and_output_weights:
        found["output_layer.weight"] = _same("lm_head.weight", (vocabulary, channels))
    return found


def _same(name: str, shape: tuple[int, ...]) -> Recipe:
    return Recipe(shape, {name: shape})


FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    ignored=re.compile(r"(^|\.)rotary_emb\.inv_freq$"),
    model_config=model_config,
    recipes=recipes,
)
