"""Llama 2 and 3, and models with their architecture: transformers' LlamaForCausalLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flextron_mcore.config import ModelConfig
from flextron_mcore.families.family import Family, Names, any_width
from flextron_mcore.families.keys import ConfigKey, Key, Option, Rope
from flextron_mcore.families.tensors import Layer


def _refusal(model: ModelConfig, hidden_size: int, layer: Layer) -> str | None:
    """Reason why transformers 5 refuses a LlamaForCausalLM with these widths in all its layers, None if it accepts them.

    It wants hidden_size to be a multiple of the number of query heads. model: unused.
    """
    heads = layer.kv_groups * layer.query_heads_per_group
    if hidden_size % heads:
        return f"transformers 5 refuses a stock Llama whose hidden_size, {hidden_size}, is not a multiple of its {heads} heads"
    return None


FAMILY = Family(
    name="Llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    classes="Llama",
    needs={"normalization": ("rmsnorm",), "activation": ("swiglu",), "position_embedding_type": ("rope",)},
    keys=(  # in the order of an exported config.json; without pretraining_tp, which does not change results
        Key("vocab_size", "vocab_size", int),
        Key("hidden_size", "hidden_size", int),
        Key("intermediate_size", "ffn_hidden_size", int),
        Key("num_hidden_layers", "num_layers", int),
        Key("num_attention_heads", "num_attention_heads", int),
        Key("num_key_value_heads", "num_query_groups", int, None),
        Key("head_dim", "kv_channels", int, None),
        Option("hidden_act", "silu", written=True, also=("swish",)),
        Key("max_position_embeddings", "max_position_embeddings", int, 2048),
        Key("initializer_range", "init_method_std", float, 0.02),
        Key("rms_norm_eps", "layernorm_epsilon", float, 1e-6),
        Rope(),
        Key("attention_bias", "bias", bool, False),
        Key("mlp_bias", "bias", bool, False),
        Key("attention_dropout", "attention_dropout", float, 0.0),
        Key("tie_word_embeddings", "share_embeddings_and_output_weights", bool, False),
    ),
    widths={
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "kv_groups",
        "intermediate_size": "ffn_hidden_size",
    },
    names=Names(
        {
            "embedding.word_embeddings": "model.embed_tokens",
            "self_attention.linear_qkv.layer_norm": "input_layernorm",
            "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attention.linear_proj": "self_attn.o_proj",
            "mlp.linear_fc1.layer_norm": "post_attention_layernorm",
            "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.linear_fc2": "mlp.down_proj",
            "decoder.final_layernorm": "model.norm",
            "output_layer": "lm_head",
        },
        layers="model.layers.{}.",
    ),
    prefix="model.",
    ignored=re.compile(r"(^|\.)rotary_emb\.inv_freq$"),
    refusal=_refusal,
)


def variant(
    name: str,
    *,
    needs: Mapping[str, tuple[Any, ...]] | None = None,
    defaults: Mapping[str, Any] | None = None,
    rope: Rope | None = None,
    more: tuple[ConfigKey, ...] = (),
    more_names: Mapping[str, str] | None = None,
    **changes: Any,
) -> Family:
    """Family that differs from Llama in a few config keys or tensors.

    Layers have no biases, unless `needs` or `more` adds them. Exports use Llama's modelling code with the names replaced.

    Args:
        name: prefix of the family's class names in transformers, such as Mistral.
        needs: entries of `Family.needs` to add or replace.
        defaults: {key of config.json: transformers' default}, for defaults that differ from Llama's.
        rope: keys of rotary embeddings; None: as in Llama.
        more: keys of config.json to add.
        more_names: {Megatron-Core's module: module in transformers} to add.
        changes: other fields of `Family`, by name.
    """

    def changed(key: ConfigKey) -> ConfigKey:
        if isinstance(key, Key):
            return replace(key, default=(defaults or {}).get(key.theirs, key.default))
        return rope or key if isinstance(key, Rope) else key

    keys = [changed(key) for key in FAMILY.keys if not isinstance(key, Key) or key.ours != "bias"]
    values: dict[str, Any] = {
        "name": name,
        "architecture": f"{name}ForCausalLM",
        "model_type": name.lower(),
        "classes": name,
        "code": FAMILY.classes,
        "needs": {**FAMILY.needs, **(needs or {})},
        "keys": (*keys, *more),
        "names": replace(FAMILY.names, modules={**FAMILY.names.modules, **(more_names or {})}),
        "refusal": any_width,
    }
    return replace(FAMILY, **{**values, **changes})
