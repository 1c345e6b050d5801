"""Export as GPT-2: GPT2LMHeadModel, or FlextronGPT2LMHeadModel where layers differ or have fewer heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from flextron_mcore.checkpoint.hf_import.gpt2 import ACTIVATIONS
from flextron_mcore.config import ModelConfig
from flextron_mcore.export.hf.target import Part, Target, misfit
from flextron_mcore.space import LayerChoice, SubNetwork


def misfits(model: ModelConfig) -> list[str]:
    """What keeps `model` from being a GPT-2."""
    return [
        *misfit(model, "normalization", "layernorm", "layernorm1p"),
        *misfit(model, "activation", *dict.fromkeys(ACTIVATIONS.values())),
        *misfit(model, "position_embedding_type", "learned_absolute"),
        *misfit(model, "bias", True),
        *misfit(model, "num_query_groups", model.num_attention_heads),
    ]


def not_stock(model: ModelConfig, net: SubNetwork) -> str | None:
    """Why GPT2LMHeadModel cannot hold `net`: it differs by layer, or its heads do not fill the hidden size."""
    if not net.is_uniform:
        return "the widths differ from layer to layer"
    heads = next(layer for layer in net.layers if layer.executed).num_attention_heads
    if heads * model.kv_channels != net.hidden_size:
        return f"a stock GPT-2 has hidden_size / head size = {net.hidden_size / model.kv_channels:g} heads, this one {heads}"
    return None


def config(model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """GPT2Config of a dense model."""
    theirs = next(name for name, ours in ACTIVATIONS.items() if ours == model.activation)
    if ACTIVATIONS.get(source.get("activation_function")) == model.activation:
        theirs = source["activation_function"]  # two names mean the same function
    return {
        "vocab_size": model.vocab_size,
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "activation_function": theirs,
        "layer_norm_epsilon": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": source.get("embd_pdrop", model.hidden_dropout),
        "attn_pdrop": model.attention_dropout,
        "scale_attn_weights": True,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
    }


def widths(layer: LayerChoice) -> dict[str, int]:
    """One entry of `per_layer_config`."""
    return {"num_attention_heads": layer.num_attention_heads, "n_inner": layer.ffn_hidden_size}


def parts(model: ModelConfig, layers: Sequence[LayerChoice], hidden_size: int) -> Iterator[Part]:
    """All tensors. GPT-2's Conv1D stores [in, out]: transposed."""

    def norm(ours: str, theirs: str) -> Iterator[Part]:
        # Megatron-Core's "1p" norms store the scale less one.
        scale = (lambda w: (w + 1,)) if model.normalization == "layernorm1p" else (lambda w: (w,))
        yield Part(f"{ours}weight", {f"{theirs}.weight": (hidden_size,)}, scale)
        yield Part(f"{ours}bias", {f"{theirs}.bias": (hidden_size,)})

    def conv(ours: str, theirs: str, rows: int, columns: int, order=lambda tensor: tensor) -> Iterator[Part]:
        yield Part(f"{ours}.weight", {f"{theirs}.weight": (columns, rows)}, lambda w: (order(w).t(),))
        yield Part(f"{ours}.bias", {f"{theirs}.bias": (rows,)}, lambda b: (order(b),))

    def qkv(tensor: torch.Tensor) -> torch.Tensor:
        """Head after head its query, its key, its value -> all queries, all keys, all values."""
        return tensor.unflatten(0, (-1, 3, model.kv_channels)).transpose(0, 1).flatten(0, 2)

    yield Part("embedding.word_embeddings.weight", {"transformer.wte.weight": (model.vocab_size, hidden_size)})
    yield Part("embedding.position_embeddings.weight", {"transformer.wpe.weight": (model.max_position_embeddings, hidden_size)})
    for i, layer in enumerate(layers):
        ours, theirs = f"decoder.layers.{i}.", f"transformer.h.{i}."
        heads, ffn = layer.num_attention_heads * model.kv_channels, layer.ffn_hidden_size
        yield from norm(ours + "self_attention.linear_qkv.layer_norm_", theirs + "ln_1")
        yield from conv(ours + "self_attention.linear_qkv", theirs + "attn.c_attn", 3 * heads, hidden_size, qkv)
        yield from conv(ours + "self_attention.linear_proj", theirs + "attn.c_proj", hidden_size, heads)
        yield from norm(ours + "mlp.linear_fc1.layer_norm_", theirs + "ln_2")
        yield from conv(ours + "mlp.linear_fc1", theirs + "mlp.c_fc", ffn, hidden_size)
        yield from conv(ours + "mlp.linear_fc2", theirs + "mlp.c_proj", hidden_size, ffn)
    yield from norm("decoder.final_layernorm.", "transformer.ln_f")
    if not model.share_embeddings_and_output_weights:
        yield Part("output_layer.weight", {"lm_head.weight": (model.vocab_size, hidden_size)})


TARGET = Target(
    name="GPT-2",
    stock="GPT2LMHeadModel",
    classes="GPT2",
    model_type="gpt2",
    misfits=misfits,
    not_stock=not_stock,
    config=config,
    widths=widths,
    parts=parts,
)
