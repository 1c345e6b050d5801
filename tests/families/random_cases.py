"""Random models of every family, as transformers builds them, and random sub-networks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import GPT2Config, PreTrainedModel

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.space import SubNetwork
from tests import hf_toy

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
SCALINGS = (None, hf_toy.LINEAR, hf_toy.LLAMA3, YARN, {**YARN, "beta_fast": 20.0, "attention_factor": 1.3})
# LongRoPE: with an original context one token shorter than the texts, which takes the long factors, and with one as long as the
# texts, which takes the short ones
LONGROPE = ({"original": hf_toy.LENGTH - 1}, {"original": hf_toy.LENGTH, "factor": 4.0})


def llama_like(draw: random.Random, sizes: tuple[int, ...] = (4, 6, 8, 16), partial: float = 1.0, **more: Any) -> dict[str, Any]:
    """Arguments of a configuration in odd shapes: heads that do not fill the hidden size, one group, one layer, tied or not.

    sizes: channels of a head to draw from. partial: share of them that is rotated.
    """
    groups, queries, layers = draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 4)
    size = draw.choice(sizes)
    scaling = copy.deepcopy(draw.choice((*SCALINGS, *LONGROPE)))
    if scaling and "original" in scaling:
        scaling = hf_toy.longrope(int(size * partial) // 2, **scaling)
    return {
        "vocab_size": hf_toy.VOCAB,
        "hidden_size": 2 * groups * queries * draw.randint(2, 4),
        "intermediate_size": draw.choice([24, 40, 63]),
        "num_hidden_layers": layers,
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "head_dim": size,
        "max_position_embeddings": hf_toy.LENGTH,
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_theta": draw.choice([500.0, 10000.0]),
        "rope_scaling": scaling,
        "bos_token_id": 3,
        "eos_token_id": 5,
        "pad_token_id": None,
        **more,
    }


def _biased(draw: random.Random) -> dict[str, Any]:
    biased = draw.random() < 0.5
    return {"attention_bias": biased, "mlp_bias": biased}


def _windows(draw: random.Random, values: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Arguments with, in half of the cases, a sliding window in layers that are listed."""
    kinds = [draw.choice(["full_attention", "sliding_attention"]) for _ in range(values["num_hidden_layers"])]
    if draw.random() < 0.5:
        return values
    return values | {"sliding_window": draw.choice([1, 7, 50]), "layer_types": kinds, **more}


def smollm3(draw: random.Random) -> dict[str, Any]:
    """Arguments of a SmolLM3, some of whose layers do not rotate queries and keys."""
    values = llama_like(draw, **_biased(draw))
    values |= {"no_rope_layers": [draw.randint(0, 1) for _ in range(values["num_hidden_layers"])]}
    return _windows(draw, values, use_sliding_window=True)


def phi3(draw: random.Random) -> dict[str, Any]:
    """Arguments of a Phi-3. Its only scaling is longrope; with it, heads fill the hidden size."""
    partial = draw.choice([1.0, 0.75, 0.5])
    values = llama_like(draw, (4, 8, 16) if partial == 0.5 else (8, 16), partial, partial_rotary_factor=partial)
    values["sliding_window"] = draw.choice([None, 7])
    if (values["rope_scaling"] or {}).get("rope_type") != "longrope":
        return values | {"rope_scaling": None}
    original = values["rope_scaling"].pop("original_max_position_embeddings")
    hidden = values["head_dim"] * values["num_attention_heads"]
    return values | {"hidden_size": hidden, "original_max_position_embeddings": original}


def gpt2(draw: random.Random) -> dict[str, Any]:
    """Arguments of a GPT-2, whose heads fill the hidden size."""
    heads = draw.randint(1, 8)
    return {
        "vocab_size": hf_toy.VOCAB,
        "n_embd": heads * draw.choice([4, 6, 8, 16]),
        "n_inner": draw.choice([24, 40, 63]),
        "n_layer": draw.randint(1, 4),
        "n_head": heads,
        "n_positions": hf_toy.LENGTH,
        "activation_function": draw.choice(["gelu_new", "relu"]),  # trtllm has gelu_new for the exact gelu
        "tie_word_embeddings": draw.random() < 0.5,
        "bos_token_id": 3,
        "eos_token_id": 5,
    }


# {family: function from a random state to the arguments of its configuration}
FAMILIES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "Llama": lambda draw: llama_like(draw, **_biased(draw)),
    "Mistral": lambda draw: llama_like(draw, sliding_window=draw.choice([None, None, 1, 7, 50])),
    "Ministral": lambda draw: _windows(draw, llama_like(draw, sliding_window=draw.choice([7, 50]))),
    "Qwen2": lambda draw: _windows(draw, llama_like(draw), use_sliding_window=True),
    "Qwen3": lambda draw: _windows(draw, llama_like(draw), use_sliding_window=True),
    "SmolLM3": lambda draw: smollm3(draw),
    "Phi3": phi3,
    "Nemotron": lambda draw: llama_like(draw, (4, 8, 16), 0.5, **_biased(draw)),
    "GPT2": gpt2,
}


def random_model(family: str, seed: int) -> PreTrainedModel:
    """Model of a family with random sizes, options and weights."""
    draw = random.Random(f"{family} {seed}")
    torch.manual_seed(draw.randrange(2**31))
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family](draw))
    kind = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    model = hf_toy._random(kind(config))
    with torch.no_grad():  # std 0.2 at most, or 1 / sqrt(channels): logits of wide models would else round by more than ATOL
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(min(1, 5 / model.config.hidden_size**0.5))
            elif family == "Nemotron":  # formats without zero-centred norms store 1 + weight: exact for these weights
                parameter.add_(1).sub_(1)
    return model


def random_space(model: PreTrainedModel, seed: int) -> dict[str, Any]:
    """Space with every number of groups or of query heads, four FFN widths, three hidden sizes and every depth."""
    draw, config = random.Random(seed), model.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    groups = getattr(config, "num_key_value_heads", heads)
    neurons = config.n_inner if isinstance(config, GPT2Config) else config.intermediate_size
    unit = draw.choice(["kv_group", "query_head"])
    step = heads // groups if unit == "kv_group" else groups
    return {
        "granularity": 1,
        "attention_unit": unit,
        "heads": list(range(step, heads + 1, step)),
        "ffn_hidden_size": [1, 7, neurons // 2, neurons],
        "hidden_size": [hidden // 4, hidden // 2, hidden],
        "depth": list(range(1, config.num_hidden_layers + 1)),
        "layer_ranking": draw.sample(range(config.num_hidden_layers), config.num_hidden_layers),
    }


def random_networks(info: CheckpointInfo, count: int, seed: int) -> list[SubNetwork]:
    """Networks of the space: half of them with the same widths in all layers, which stock classes need."""
    draw, space, model = random.Random(seed), info.space, info.model
    networks = []
    for number in range(count):
        sizes = [(draw.choice(space.heads), draw.choice(space.ffn_hidden_size)) for _ in range(model.num_layers)]
        layers = tuple(space.layer_choice(model, *(sizes[0] if number % 2 else size)) for size in sizes)
        networks.append(space.network(model, layers, draw.choice(space.hidden_size), draw.choice(space.depth)))
    return networks
