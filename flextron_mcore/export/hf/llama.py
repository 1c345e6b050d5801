"""Export as Llama: LlamaForCausalLM, or FlextronLlamaForCausalLM where layers differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from flextron_mcore.config import ModelConfig
from flextron_mcore.export.hf.target import Part, Target, misfit
from flextron_mcore.space import LayerChoice, SubNetwork


def misfits(model: ModelConfig) -> list[str]:
    """What keeps `model` from being a Llama."""
    return [
        *misfit(model, "normalization", "rmsnorm"),
        *misfit(model, "activation", "swiglu"),
        *misfit(model, "position_embedding_type", "rope"),
    ]


def not_stock(model: ModelConfig, net: SubNetwork) -> str | None:
    """Why LlamaForCausalLM cannot hold `net`: it differs by layer, or transformers 5 refuses its number of heads."""
    if not net.is_uniform:
        return "the widths differ from layer to layer"
    heads = next(layer for layer in net.layers if layer.executed).num_attention_heads
    if net.hidden_size % heads:
        return (
            f"transformers 5 refuses a stock Llama whose hidden_size, {net.hidden_size}, is not a multiple of its {heads} heads"
        )
    return None


def config(model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """LlamaConfig of a dense model. RoPE is written the way of transformers 4 and of 5; they agree."""
    scaling = dict(model.rope_scaling or {"type": "default"})
    rope = {"rope_type": scaling.pop("type"), **scaling}
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": rope if model.rope_scaling else None,
        "rope_parameters": {"rope_theta": model.rotary_base, **rope},
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
    }


def widths(layer: LayerChoice) -> dict[str, int]:
    """One entry of `per_layer_config`."""
    return {
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.kv_groups,
        "intermediate_size": layer.ffn_hidden_size,
    }


def parts(model: ModelConfig, layers: Sequence[LayerChoice], hidden_size: int) -> Iterator[Part]:
    """All tensors."""
    size, kinds = model.kv_channels, ("weight", "bias") if model.bias else ("weight",)
    yield Part("embedding.word_embeddings.weight", {"model.embed_tokens.weight": (model.vocab_size, hidden_size)})
    for i, layer in enumerate(layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        groups, ffn = layer.kv_groups, layer.ffn_hidden_size
        queries, keys = layer.num_attention_heads * size, groups * size
        yield Part(ours + "self_attention.linear_qkv.layer_norm_weight", {theirs + "input_layernorm.weight": (hidden_size,)})
        for kind in kinds:
            columns = (hidden_size,) if kind == "weight" else ()
            rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
            yield Part(
                f"{ours}self_attention.linear_qkv.{kind}",
                {f"{theirs}self_attn.{name}.{kind}": (n, *columns) for name, n in rows.items()},
                _split_qkv(groups, layer.query_heads_per_group, size),
            )
        for kind in kinds:
            shape = (hidden_size, queries) if kind == "weight" else (hidden_size,)
            yield Part(f"{ours}self_attention.linear_proj.{kind}", {f"{theirs}self_attn.o_proj.{kind}": shape})
        yield Part(ours + "mlp.linear_fc1.layer_norm_weight", {theirs + "post_attention_layernorm.weight": (hidden_size,)})
        for kind in kinds:
            shape = (ffn, hidden_size) if kind == "weight" else (ffn,)
            names = [f"{theirs}mlp.{name}.{kind}" for name in ("gate_proj", "up_proj")]
            yield Part(f"{ours}mlp.linear_fc1.{kind}", dict.fromkeys(names, shape), lambda tensor: tensor.chunk(2))
        for kind in kinds:
            shape = (hidden_size, ffn) if kind == "weight" else (hidden_size,)
            yield Part(f"{ours}mlp.linear_fc2.{kind}", {f"{theirs}mlp.down_proj.{kind}": shape})
    yield Part("decoder.final_layernorm.weight", {"model.norm.weight": (hidden_size,)})
    if not model.share_embeddings_and_output_weights:
        yield Part("output_layer.weight", {"lm_head.weight": (model.vocab_size, hidden_size)})


def _split_qkv(groups: int, queries: int, size: int):
    """Group after group its query heads, its key, its value -> all queries, all keys, all values."""

    def split(tensor: torch.Tensor) -> list[torch.Tensor]:
        grouped = tensor.unflatten(0, (groups, queries + 2, size))
        return [part.flatten(0, 2) for part in grouped.split([queries, 1, 1], dim=1)]

    return split


TARGET = Target(
    name="Llama",
    stock="LlamaForCausalLM",
    classes="Llama",
    model_type="llama",
    misfits=misfits,
    not_stock=not_stock,
    config=config,
    widths=widths,
    parts=parts,
)
