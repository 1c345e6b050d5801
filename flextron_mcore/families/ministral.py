"""Ministral 8B: transformers' MinistralForCausalLM, a Mistral in which only some layers have the sliding window."""

from __future__ import annotations

from flextron_mcore.families import llama
from flextron_mcore.families.keys import LayerWindows

FAMILY = llama.variant(
    "Ministral",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
    more=(LayerWindows("all"),),
)
