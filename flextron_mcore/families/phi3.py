"""Phi-3 and Phi-4: transformers' Phi3ForCausalLM, a Llama with fused QKV and fused gate-up projection.

Long-context models have the rotary scaling longrope, in older files by the name su or yarn.
"""

from __future__ import annotations

from dataclasses import replace

from flextron_mcore.config import ModelConfig
from flextron_mcore.families import llama
from flextron_mcore.families.keys import Key, Rope, Window
from flextron_mcore.families.tensors import Layer

_FUSED = {"self_attention.linear_qkv": "self_attn.qkv_proj", "mlp.linear_fc1": "mlp.gate_up_proj"}


def _refusal(model: ModelConfig, hidden_size: int, layer: Layer) -> str | None:
    """Reason why transformers refuses a Phi3ForCausalLM with these widths in all its layers, None if it accepts them.

    transformers computes the number of longrope's factors from hidden_size / heads, whatever head_dim is.
    """
    heads = layer.kv_groups * layer.query_heads_per_group
    if model.rope_scaling and int(hidden_size // heads * model.rotary_percent) // 2 != model.rotary_channels // 2:
        return f"transformers refuses a stock Phi-3 with longrope whose {heads} heads do not fill its hidden_size, {hidden_size}"
    return None


FAMILY = llama.variant(
    "Phi-3",
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    classes="Phi3",
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    rope=Rope(kinds=("longrope",), partial=1.0, renamed={"su": "longrope", "yarn": "longrope"}, original=4096),
    more=(
        Window(),
        Key("resid_pdrop", "hidden_dropout", float, 0.0),
        Key("embd_pdrop", "hidden_dropout", float, kept=True),
    ),
    refusal=_refusal,
    names=replace(llama.FAMILY.names, modules={**llama.FAMILY.names.modules, **_FUSED}),
)
