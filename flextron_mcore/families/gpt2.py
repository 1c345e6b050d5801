"""GPT-2 and models with its architecture: transformers' GPT2LMHeadModel."""

from __future__ import annotations

import re

from flextron_mcore.config import ModelConfig
from flextron_mcore.families.family import Family, Names
from flextron_mcore.families.keys import Key, Option
from flextron_mcore.families.tensors import Layer

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "squared-relu",
    "gelu_fast": "gelu_tanh",  # this and the next two: other names of the same functions in transformers
    "gelu_accurate": "gelu_tanh",
    "gelu_python": "gelu",
}


def _refusal(model: ModelConfig, hidden_size: int, layer: Layer) -> str | None:
    """Reason why GPT2LMHeadModel cannot have these widths in all its layers, None if it can.

    GPT2LMHeadModel requires query heads x head size = hidden size.
    """
    heads = layer.kv_groups * layer.query_heads_per_group
    if heads * model.kv_channels != hidden_size:
        return f"a stock GPT-2 has hidden_size / head size = {hidden_size / model.kv_channels:g} heads, this one {heads}"
    return None


FAMILY = Family(
    name="GPT-2",
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    classes="GPT2",
    needs={
        "normalization": ("layernorm", "layernorm1p"),
        "activation": tuple(dict.fromkeys(_ACTIVATIONS.values())),
        "position_embedding_type": ("learned_absolute",),
        "bias": (True,),
    },
    grouped=False,
    harmless=frozenset(
        "n_ctx n_special output_past predict_special_tokens summary_activation summary_first_dropout summary_proj_to_labels "
        "summary_type summary_use_proj".split()
    ),
    keys=(  # in the order of an exported config.json
        Key("vocab_size", "vocab_size", int),
        Key("n_embd", "hidden_size", int, aliases=("hidden_size",)),
        Key("n_inner", "ffn_hidden_size", int, None),
        Key("n_layer", "num_layers", int, aliases=("num_hidden_layers",)),
        Key("n_head", "num_attention_heads", int, aliases=("num_attention_heads",)),
        Key("n_positions", "max_position_embeddings", int, 1024, aliases=("max_position_embeddings",)),
        Key("activation_function", "activation", str, "gelu_new", names=_ACTIVATIONS),
        Key("layer_norm_epsilon", "layernorm_epsilon", float, 1e-5),
        Key("initializer_range", "init_method_std", float, 0.02),
        # Megatron-Core has one dropout for the residual stream; in GPT-2 embd_pdrop equals resid_pdrop.
        Key("resid_pdrop", "hidden_dropout", float, 0.1),
        Key("embd_pdrop", "hidden_dropout", float, kept=True),
        Key("attn_pdrop", "attention_dropout", float, 0.1),
        Option("scale_attn_weights", True, written=True),
        Option("scale_attn_by_inverse_layer_idx", False),
        Option("reorder_and_upcast_attn", False),
        Option("add_cross_attention", False),
        Key("tie_word_embeddings", "share_embeddings_and_output_weights", bool, True),
    ),
    widths={"num_attention_heads": "num_attention_heads", "n_inner": "ffn_hidden_size"},
    names=Names(
        {
            "embedding.word_embeddings": "transformer.wte",
            "embedding.position_embeddings": "transformer.wpe",
            "self_attention.linear_qkv.layer_norm": "ln_1",
            "self_attention.linear_qkv": "attn.c_attn",
            "self_attention.linear_proj": "attn.c_proj",
            "mlp.linear_fc1.layer_norm": "ln_2",
            "mlp.linear_fc1": "mlp.c_fc",
            "mlp.linear_fc2": "mlp.c_proj",
            "decoder.final_layernorm": "transformer.ln_f",
            "output_layer": "lm_head",
        },
        layers="transformer.h.{}.",
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),  # Conv1D stores [in, out]
    ),
    prefix="transformer.",
    ignored=re.compile(r"\.attn\.(masked_)?bias$"),
    refusal=_refusal,
)
