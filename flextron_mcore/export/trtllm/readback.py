"""The logits of a TensorRT-LLM checkpoint, from its files alone: what its engine would compute, in fp32 on the CPU.

Shape suffixes: B batch, S sequence, C hidden channels, N heads, H channels of a head, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional as F

_FUNCTIONS = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "geglu": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "squared-relu": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "swiglu": F.silu,
}


@torch.no_grad()
def checkpoint_logits(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] of the checkpoint in `folder`. One layer is in memory at a time."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    length = tokens_BS.shape[1]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / f"rank{rank}.safetensors", "pt")) for rank in range(tp * pp)]
        first, last = _Stage(files[:tp]), _Stage(files[-tp:])
        hidden_BSC = first.whole("transformer.vocab_embedding.weight")[tokens_BS]
        if config["position_embedding_type"] == "learned_absolute":
            hidden_BSC = hidden_BSC + first.whole("transformer.position_embedding.weight")[:length]
        layer = 0
        for number in range(pp):
            stage = _Stage(files[number * tp : (number + 1) * tp])
            for local in range(stage.layers()):
                hidden_BSC = _layer(config, stage, layer, f"transformer.layers.{local}.", hidden_BSC)
                layer += 1
        if layer != config["num_hidden_layers"]:
            raise AssertionError(f"{layer} layers in the files, {config['num_hidden_layers']} in config.json")
        hidden_BSC = _norm(config, last, "transformer.ln_f", hidden_BSC)
        return F.linear(hidden_BSC, last.rows("lm_head.weight"))[..., : config["vocab_size"]]


class _Stage:
    """The ranks of a pipeline stage, merged."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._files, self._names = files, set(files[0].keys())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def layers(self) -> int:
        return len({name.split(".")[2] for name in self._names if name.startswith("transformer.layers.")})

    def parts(self, name: str) -> list[torch.Tensor]:
        return [file.get_tensor(name).float() for file in self._files]

    def whole(self, name: str) -> torch.Tensor:
        """Of a tensor that all ranks have."""
        first, *others = self.parts(name)
        if not all(torch.equal(first, other) for other in others):
            raise AssertionError(f"{name}: the ranks differ")
        return first

    def rows(self, name: str) -> torch.Tensor:
        return torch.cat(self.parts(name))

    def columns(self, name: str) -> torch.Tensor:
        return torch.cat(self.parts(name), 1)

    def bias(self, name: str, split: bool) -> torch.Tensor | None:
        if name not in self:
            return None
        return self.rows(name) if split else self.whole(name)


def _layer(config: Mapping[str, Any], stage: _Stage, number: int, name: str, hidden_BSC: torch.Tensor) -> torch.Tensor:
    normed_BSC = _norm(config, stage, name + "input_layernorm", hidden_BSC)
    hidden_BSC = hidden_BSC + _attention(config, stage, number, name + "attention", normed_BSC)
    normed_BSC = _norm(config, stage, name + "post_layernorm", hidden_BSC)
    mlp = name + ("ffn" if "layer_configs" in config else "mlp")
    inner = F.linear(normed_BSC, stage.rows(mlp + ".fc.weight"), stage.bias(mlp + ".fc.bias", split=True))
    inner = _FUNCTIONS[config["hidden_act"]](inner)
    if mlp + ".gate.weight" in stage:
        inner = inner * F.linear(normed_BSC, stage.rows(mlp + ".gate.weight"), stage.bias(mlp + ".gate.bias", split=True))
    return hidden_BSC + F.linear(inner, stage.columns(mlp + ".proj.weight"), stage.bias(mlp + ".proj.bias", split=False))


def _attention(config: Mapping[str, Any], stage: _Stage, number: int, name: str, hidden_BSC: torch.Tensor) -> torch.Tensor:
    tp, size, heads, kv_heads = (
        config["mapping"]["tp_size"],
        config["head_size"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
    )
    if "layer_configs" in config:
        kv_heads = config["layer_configs"][number]["attention"]["num_key_value_heads"]
    rows = [heads // tp * size, *[max(kv_heads // tp, 1) * size] * 2]
    copies = max(tp // kv_heads, 1)  # ranks that have the same KV head

    def merged(kind: str) -> list[torch.Tensor]:
        ranks = [part.split(rows) for part in stage.parts(f"{name}.qkv.{kind}")]
        return [torch.cat([rank[i] for rank in ranks[:: 1 if i == 0 else copies]]) for i in range(3)]

    weights = merged("weight")
    biases = merged("bias") if f"{name}.qkv.bias" in stage else [None] * 3
    query, key, value = (
        F.linear(hidden_BSC, weight, bias).unflatten(-1, (-1, size)).transpose(1, 2)
        for weight, bias in zip(weights, biases, strict=True)
    )
    if config["position_embedding_type"] == "rope_gpt_neox":
        query, key = _rotate(config, query), _rotate(config, key)
    context_BNSH = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    context_BSC = context_BNSH.transpose(1, 2).flatten(2)
    return F.linear(context_BSC, stage.columns(f"{name}.dense.weight"), stage.bias(f"{name}.dense.bias", split=False))


def _norm(config: Mapping[str, Any], stage: _Stage, name: str, hidden_BSC: torch.Tensor) -> torch.Tensor:
    weight, shape, epsilon = stage.whole(name + ".weight"), hidden_BSC.shape[-1:], config["norm_epsilon"]
    if config["architecture"] == "GPTForCausalLM":
        return F.layer_norm(hidden_BSC, shape, weight, stage.whole(name + ".bias"), epsilon)
    return F.rms_norm(hidden_BSC, shape, weight, epsilon)


def _rotate(config: Mapping[str, Any], x_BNSH: torch.Tensor) -> torch.Tensor:
    """Rotary positions; the halves of a head are the two coordinates."""
    length, size = x_BNSH.shape[-2:]
    frequency = config["rotary_base"] ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaling = config["rotary_scaling"]
    if scaling and scaling["type"] == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling:
        frequency = _llama3(scaling, frequency)
    angle = torch.arange(length)[:, None] * frequency
    a, b = x_BNSH.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def _llama3(scaling: Mapping[str, Any], frequency: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: frequencies of long waves are divided by the factor, those of short ones kept, between them interpolated."""
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # over the original length
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling["factor"])
