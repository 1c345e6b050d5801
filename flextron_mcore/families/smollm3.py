"""SmolLM3: transformers' SmolLM3ForCausalLM, a Llama in which some layers have no rotary embedding (NoPE)."""

from __future__ import annotations

from flextron_mcore.families import llama
from flextron_mcore.families.keys import Key, LayerWindows, NoRope, Rope

FAMILY = llama.variant(
    "SmolLM3",
    defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    rope=Rope(theta=2e6),
    more=(
        Key("attention_bias", "bias", bool, False),
        Key("mlp_bias", "bias", bool, False),
        NoRope(),
        LayerWindows("unrotated", default=None),
    ),
)
