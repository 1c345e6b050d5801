"""Qwen2 and Qwen2.5: transformers' Qwen2ForCausalLM, a Llama with biases on queries, keys and values only."""

from __future__ import annotations

from flextron_mcore.families import llama
from flextron_mcore.families.keys import LayerWindows

FAMILY = llama.variant(
    "Qwen2",
    needs={"add_qkv_bias": (True,)},
    defaults={"max_position_embeddings": 32768},
    more=(LayerWindows(),),
    harmless=frozenset({"use_mrope"}),  # transformers ignores the key
)
