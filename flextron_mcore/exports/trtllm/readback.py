"""Logits of a TensorRT-LLM checkpoint, computed from its files alone in fp32 on the CPU, as its engine would."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional as F

from flextron_mcore.exports.reference import Decoder, frequencies, llama3_factors

_FUNCTIONS = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "geglu": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "squared-relu": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "swiglu": F.silu,
}
# {role: (name, dimension in which ranks split its weight, the same of its bias)}; None: not split.
_NAMES: dict[str, tuple[str, int | None, int | None]] = {
    "words": ("transformer.vocab_embedding", None, None),
    "positions": ("transformer.position_embedding", None, None),
    "attention_norm": ("input_layernorm", None, None),
    "query_norm": ("attention.q_layernorm", None, None),
    "key_norm": ("attention.k_layernorm", None, None),
    "projection": ("attention.dense", 1, None),
    "mlp_norm": ("post_layernorm", None, None),
    "gate": ("mlp.fc", 0, 0),
    "up": ("mlp.gate", 0, 0),
    "down": ("mlp.proj", 1, None),
    "final_norm": ("transformer.ln_f", None, None),
    "output": ("lm_head", 0, None),
}
_PARTS = ("query", "key", "value")


def checkpoint_logits(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] of the checkpoint in `folder` for tokens [batch, sequence]."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / f"rank{rank}.safetensors", "pt")) for rank in range(tp * pp)]
        stages = [files[number * tp : (number + 1) * tp] for number in range(pp)]
        counts = [len({name.split(".")[2] for name in stage[0].keys() if ".layers." in name}) for stage in stages]
        if sum(counts) != config["num_hidden_layers"]:
            raise AssertionError(f"{sum(counts)} layers in the files, {config['num_hidden_layers']} in config.json")
        places = [(stage, local) for stage, count in zip(stages, counts, strict=True) for local in range(count)]

        def tensor(role: str) -> torch.Tensor | None:
            *layer, name, kind = role.split(".")
            if not layer:
                return _read(stages[0 if name in ("words", "positions") else -1], "", name, kind)
            stage, local = places[int(layer[0])]
            if name in _PARTS:
                return _read_qkv(config, stage, int(layer[0]), f"transformer.layers.{local}.attention.qkv.{kind}")[name]
            mlp = "ffn" if "layer_configs" in config else "mlp"
            return _read(stage, f"transformer.layers.{local}.", name, kind, mlp)

        decoder = Decoder(
            tensor,
            layers=config["num_hidden_layers"],
            head_size=config["head_size"],
            epsilon=config["norm_epsilon"],
            rms_norm=config["architecture"] != "GPTForCausalLM",
            activation=_FUNCTIONS[config["hidden_act"]],
            frequency_I=_frequencies(config) if config["position_embedding_type"] == "rope_gpt_neox" else None,
        )
        return decoder.logits(tokens_BS)[..., : config["vocab_size"]]


def _read(files: Sequence[Any], start: str, role: str, kind: str, mlp: str = "mlp") -> torch.Tensor | None:
    """Tensor in fp32, with the parts of tensor-parallel ranks joined; None if the files do not have it.

    Args:
        files: opened safetensors file of each tensor-parallel rank of a pipeline stage.
        start: start of the tensor's name, such as "transformer.layers.0."; "" outside of layers.
        role: key of _NAMES.
        kind: "weight" or "bias".
        mlp: name of the MLP module in the files.
    """
    theirs, *axes = _NAMES[role]
    name, axis = f"{start}{theirs.replace('mlp.', mlp + '.')}.{kind}", axes[kind == "bias"]
    if name not in files[0].keys():
        return None
    parts = [file.get_tensor(name).float() for file in files]
    if axis is not None:
        return torch.cat(parts, axis)
    if not all(torch.equal(parts[0], other) for other in parts[1:]):
        raise AssertionError(f"{name}: the ranks differ")
    return parts[0]


def _read_qkv(config: Mapping[str, Any], files: Sequence[Any], layer: int, name: str) -> dict[str, torch.Tensor | None]:
    """{"query", "key", "value": tensor} of one layer in fp32, with the parts of tensor-parallel ranks joined.

    Each is None if the files have no tensor `name`, such as the bias of a model without biases.

    Args:
        config: content of config.json.
        files: opened safetensors file of each tensor-parallel rank of the layer's pipeline stage.
        layer: index of the layer in the model.
        name: name of the fused QKV weight or bias in the files.
    """
    if name not in files[0].keys():
        return dict.fromkeys(_PARTS)
    tp, size, heads, kv_heads = len(files), *(config[key] for key in ("head_size", "num_attention_heads", "num_key_value_heads"))
    if "layer_configs" in config:
        kv_heads = config["layer_configs"][layer]["attention"]["num_key_value_heads"]
    rows = [heads // tp * size, *[max(kv_heads // tp, 1) * size] * 2]
    copies = max(tp // kv_heads, 1)  # ranks with the same KV head
    ranks = [file.get_tensor(name).float().split(rows) for file in files]
    return {part: torch.cat([rank[i] for rank in ranks[:: copies if i else 1]]) for i, part in enumerate(_PARTS)}


def _frequencies(config: Mapping[str, Any]) -> torch.Tensor:
    """Rotary frequencies [channels / 2] with the scaling in config.json. config: content of config.json."""
    channels = int(config["head_size"] * config.get("rotary_pct", 1.0))
    frequency_I, scaling = frequencies(config["rotary_base"], channels), config["rotary_scaling"]
    if not scaling:
        return frequency_I
    return frequency_I / (scaling["factor"] if scaling["type"] == "linear" else llama3_factors(scaling, frequency_I))
