"""GPT-2 and what shares its architecture: GPT2LMHeadModel of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from flextron_mcore.checkpoint.hf_import.common import Family, Recipe, require, value
from flextron_mcore.config import FlextronError, ModelConfig

# transformers' names for activation functions; the first of each of ours is what an export writes.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "relu2": "squared-relu"}


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a GPT2Config; where it leaves a value out, transformers' default.

    Megatron-Core has one dropout for the residual stream: `resid_pdrop` (in GPT-2 it equals `embd_pdrop`).
    """
    require(config, "scale_attn_weights", True)
    require(config, "scale_attn_by_inverse_layer_idx", False)
    require(config, "reorder_and_upcast_attn", False)
    require(config, "add_cross_attention", False)
    activation = value(config, "activation_function", str, "gelu_new")
    if activation not in ACTIVATIONS:
        raise FlextronError(f"activation_function={activation!r} is not supported: only {', '.join(ACTIVATIONS)}")
    hidden = value(config, "n_embd", int)
    return ModelConfig(
        num_layers=value(config, "n_layer", int),
        hidden_size=hidden,
        num_attention_heads=value(config, "n_head", int),
        vocab_size=value(config, "vocab_size", int),
        max_position_embeddings=value(config, "n_positions", int, 1024),
        ffn_hidden_size=value(config, "n_inner", int, 4 * hidden),
        activation=ACTIVATIONS[activation],
        normalization="layernorm",
        layernorm_epsilon=value(config, "layer_norm_epsilon", float, 1e-5),
        bias=True,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=value(config, "tie_word_embeddings", bool, True),
        init_method_std=value(config, "initializer_range", float, 0.02),
        hidden_dropout=value(config, "resid_pdrop", float, 0.1),
        attention_dropout=value(config, "attn_pdrop", float, 0.1),
    )


def recipes(model: ModelConfig) -> dict[str, Recipe]:
    """Megatron-Core name -> Recipe, in the order of the network. GPT-2's Conv1D stores [in, out]: transposed."""
    vocabulary, channels, ffn = model.vocab_size, model.hidden_size, model.ffn_hidden_size
    heads, size = model.num_attention_heads, model.kv_channels

    def qkv(weight_or_bias: torch.Tensor) -> torch.Tensor:
        """[.., query | key | value of all heads] -> head after head its query, its key, its value, [out, ..]."""
        parts = weight_or_bias.movedim(-1, 0).unflatten(0, (3, heads, size))
        return parts.transpose(0, 1).flatten(0, 2)

    found = {
        "embedding.word_embeddings.weight": _same("transformer.wte.weight", (vocabulary, channels)),
        "embedding.position_embeddings.weight": _same("transformer.wpe.weight", (model.max_position_embeddings, channels)),
    }
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"transformer.h.{i}."
        for kind in ("weight", "bias"):
            found[f"{ours}self_attention.linear_qkv.layer_norm_{kind}"] = _same(f"{theirs}ln_1.{kind}", (channels,))
            found[f"{ours}mlp.linear_fc1.layer_norm_{kind}"] = _same(f"{theirs}ln_2.{kind}", (channels,))
        for name, conv, rows, columns in (
            ("self_attention.linear_qkv", "attn.c_attn", 3 * heads * size, channels),
            ("self_attention.linear_proj", "attn.c_proj", channels, heads * size),
            ("mlp.linear_fc1", "mlp.c_fc", ffn, channels),
            ("mlp.linear_fc2", "mlp.c_proj", channels, ffn),
        ):
            weight, bias = (qkv, qkv) if name.endswith("qkv") else (torch.t, lambda tensor: tensor)
            found[f"{ours}{name}.weight"] = Recipe((rows, columns), {f"{theirs}{conv}.weight": (columns, rows)}, weight)
            found[f"{ours}{name}.bias"] = Recipe((rows,), {f"{theirs}{conv}.bias": (rows,)}, bias)
    for kind in ("weight", "bias"):
        found[f"decoder.final_layernorm.{kind}"] = _same(f"transformer.ln_f.{kind}", (channels,))
    if not model.share_embeddings_and_output_weights:
        found["output_layer.weight"] = _same("lm_head.weight", (vocabulary, channels))
    return found


def _same(name: str, shape: tuple[int, ...]) -> Recipe:
    return Recipe(shape, {name: shape})


FAMILY = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    ignored=re.compile(r"\.attn\.(masked_)?bias$"),
    model_config=model_config,
    recipes=recipes,
)
