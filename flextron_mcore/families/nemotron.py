"""Nemotron-4 and Minitron: transformers' NemotronForCausalLM, with squared ReLU, layernorm1p and partial rotary embedding."""

from __future__ import annotations

from dataclasses import replace

from flextron_mcore.families import llama
from flextron_mcore.families.keys import Key, Option, Rope

_NAMES = {name: theirs for name, theirs in llama.FAMILY.names.modules.items() if name != "mlp.linear_fc1"}

FAMILY = llama.variant(
    "Nemotron",
    keys=(  # in the order of an exported config.json
        Key("vocab_size", "vocab_size", int),
        Key("hidden_size", "hidden_size", int),
        Key("intermediate_size", "ffn_hidden_size", int),
        Key("num_hidden_layers", "num_layers", int),
        Key("num_attention_heads", "num_attention_heads", int),
        Key("num_key_value_heads", "num_query_groups", int, None),
        Key("head_dim", "kv_channels", int, None),
        Option("hidden_act", "relu2", written=True),
        Key("max_position_embeddings", "max_position_embeddings", int, 4096),
        Key("initializer_range", "init_method_std", float, 0.0134),
        Key("norm_eps", "layernorm_epsilon", float, 1e-5),
        Rope(partial=0.5),
        Key("attention_bias", "bias", bool, False),
        Key("mlp_bias", "bias", bool, False),
        Key("attention_dropout", "attention_dropout", float, 0.0),
        Key("tie_word_embeddings", "share_embeddings_and_output_weights", bool, False),
    ),
    needs={"normalization": ("layernorm1p",), "activation": ("squared-relu",)},
    names=replace(llama.FAMILY.names, modules={**_NAMES, "mlp.linear_fc1": "mlp.up_proj"}),
    harmless=frozenset({"kv_channels", "rope_percent"}),  # transformers ignores both keys
)
