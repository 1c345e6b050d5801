"""Mistral 7B, Nemo and Small: transformers' MistralForCausalLM, a Llama without biases that may have a sliding window."""

from __future__ import annotations

from flextron_mcore.families import llama
from flextron_mcore.families.keys import Window

FAMILY = llama.variant(
    "Mistral",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
    more=(Window(default=4096),),
)
