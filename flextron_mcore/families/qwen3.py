"""Qwen3, dense: transformers' Qwen3ForCausalLM, a Llama that normalises each head's query and key before their rotation."""

from __future__ import annotations

from flextron_mcore.families import llama
from flextron_mcore.families.keys import LayerWindows, Option

FAMILY = llama.variant(
    "Qwen3",
    needs={"qk_layernorm": (True,)},
    defaults={"max_position_embeddings": 32768, "head_dim": 128},
    more=(Option("attention_bias", False, written=True), LayerWindows()),
    more_names={"self_attention.q_layernorm": "self_attn.q_norm", "self_attention.k_layernorm": "self_attn.k_norm"},
)
