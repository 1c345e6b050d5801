"""Phi-3 and Phi-4: transformers' Phi3ForCausalLM, a Llama with fused QKV and fused gate-up projection.

Models with the rotary scaling longrope (long-context models) are refused. A model with different widths in its layers is
exported as Mistral, which computes the same function with separate projections.
"""

from __future__ import annotations

from dataclasses import replace

from flextron_mcore.families import llama
from flextron_mcore.families.keys import Key, Rope, Window

_FUSED = {"self_attention.linear_qkv": "self_attn.qkv_proj", "mlp.linear_fc1": "mlp.gate_up_proj"}

FAMILY = llama.variant(
    "Phi-3",
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    classes=None,
    code="",
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    rope=Rope(kinds=(), partial=1.0),
    more=(
        Window(),
        Key("resid_pdrop", "hidden_dropout", float, 0.0),
        Key("embd_pdrop", "hidden_dropout", float, kept=True),
    ),
    names=replace(llama.FAMILY.names, modules={**llama.FAMILY.names.modules, **_FUSED}),
)
