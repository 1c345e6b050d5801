"""Llama 2 and 3, and what shares their architecture: LlamaForCausalLM of transformers."""

from __future__ import annotations

import re

from flextron_mcore.config import ModelConfig
from flextron_mcore.families.family import Family, Names
from flextron_mcore.families.keys import Key, Option, Rope
from flextron_mcore.families.tensors import Layer


def _refusal(model: ModelConfig, hidden_size: int, layer: Layer) -> str | None:
    """Why transformers 5 refuses a LlamaForCausalLM whose layers all have these widths."""
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
    keys=(  # in the order of an exported config.json; pretraining_tp changes no result
        Key("vocab_size", "vocab_size", int),
        Key("hidden_size", "hidden_size", int),
        Key("intermediate_size", "ffn_hidden_size", int),
        Key("num_hidden_layers", "num_layers", int),
        Key("num_attention_heads", "num_attention_heads", int),
        Key("num_key_value_heads", "num_query_groups", int, None),
        Key("head_dim", "kv_channels", int, None),
        Option("hidden_act", "silu", written=True),
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
