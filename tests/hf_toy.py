"""Small random Hugging Face models, their import into Megatron-Core, and what sub-networks of them should compute."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flextron_mcore.checkpoint.hf import import_hf, open_hf
from flextron_mcore.checkpoint.reader import load_model
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.checkpoint.writer import write_streaming
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.model import build_model
from flextron_mcore.runtime.disk import write_aside
from flextron_mcore.space import SubNetwork

VOCAB, LENGTH = 67, 96
ATOL = 1e-5

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def longrope(pairs: int, original: int, **more: Any) -> dict[str, Any]:
    """rope_scaling of type longrope, with factors that grow with the channel pair; the first short factor is 1, as published.

    Args:
        pairs: number of pairs of rotated channels.
        original: original_max_position_embeddings.
        more: further keys.
    """
    factors = [1 + 0.25 * pair for pair in range(pairs)]
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": [1.5 * factor for factor in factors],
        "original_max_position_embeddings": original,
        **more,
    }


def llama(**changes: Any) -> LlamaForCausalLM:
    """Random Llama with 48 channels and 8 query heads of size 8 in 4 groups: a head has more than channels / heads channels."""
    values = dict(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=VOCAB,
        max_position_embeddings=LENGTH,
        bos_token_id=3,
        eos_token_id=5,
    )
    values = copy.deepcopy({**values, **changes})  # because LlamaConfig changes dicts in place
    return _random(LlamaForCausalLM(LlamaConfig(**values)))


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    values = dict(
        n_embd=32, n_inner=40, n_layer=2, n_head=4, n_positions=LENGTH, vocab_size=VOCAB, bos_token_id=3, eos_token_id=5
    )
    return _random(GPT2LMHeadModel(GPT2Config(**{**values, **changes})))


def any_model(draw: Callable[..., Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Small random Llama or GPT-2, in odd shapes too, and keys of a space for it. draw: Hypothesis' data.draw."""
    groups, queries, layers = (draw(st.integers(1, 3), name) for name in ("groups", "queries", "layers"))
    size, tied = draw(st.sampled_from([4, 6, 8]), "head size"), draw(st.booleans(), "tied")
    torch.manual_seed(draw(st.integers(0, 1000), "seed"))
    heads = groups * queries
    if draw(st.booleans(), "gpt2"):
        groups, queries = heads, 1
        model = gpt2(n_embd=heads * size, n_inner=24, n_layer=layers, n_head=heads, tie_word_embeddings=tied)
    else:
        biased = draw(st.booleans(), "biases")
        model = llama(
            hidden_size=heads * draw(st.integers(2, 9), "channels a head"),
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=size,
            tie_word_embeddings=tied,
            attention_bias=biased,
            mlp_bias=biased,
        )
    with torch.no_grad():  # lower std of wide models, whose logits would else round by more than ATOL
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(min(1, 5 / model.config.hidden_size**0.5))
    unit = draw(st.sampled_from(["kv_group", "query_head"]), "unit")
    step = queries if unit == "kv_group" else groups
    counts = list(range(step, heads + 1, step))
    return model, {"granularity": 1, "attention_unit": unit, "heads": counts, "ffn_hidden_size": [1, 7, 24]}


def _random(model: PreTrainedModel) -> PreTrainedModel:
    """Draw all parameters, norms and biases too, so that a lost or misplaced tensor changes the logits; return the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
            if parameter.dim() == 1:
                parameter.add_(0.75)
    return model.eval()


def tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Random token ids [batch, length], the same in every call."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def checkpoint(source: Path, run: Path, space: dict[str, Any] | None = None, dtype: str | None = None) -> CheckpointInfo:
    """Import a Hugging Face directory into `run`/checkpoints/iter_0000000, and return the checkpoint's description.

    Args:
        source: Hugging Face directory.
        run: run directory, which is made.
        space: keys of the space; heads is [0.5, 1.0] unless given.
        dtype: dtype of the checkpoint; default: the model's.
    """
    info, tensors = import_hf(source, {"heads": [0.5, 1.0], **(space or {})}, dtype)
    target = run / "checkpoints" / "iter_0000000"
    with write_aside(target) as folder:
        write_streaming(folder, info, tensors)
    return replace(info, path=target)


def check_import(theirs: PreTrainedModel, folder: Path) -> None:
    """Assert that the imported model has the logits of `theirs`."""
    info = checkpoint(save(theirs, folder / "hf"), folder / "run")
    expected, found = logits(theirs), logits(megatron(info))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def check_refusal(config: dict[str, Any], folder: Path, words: list[str]) -> None:
    """Assert that a model with this config.json is refused in one line that names the file and contains `words`."""
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlextronError) as caught:
        open_hf(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(folder / "config.json"), *words]:
        assert word in message


def megatron(info: CheckpointInfo) -> torch.nn.Module:
    """Elastic model with the weights of a checkpoint."""
    model = build_model(info.model, info.space)
    load_model(model, info)
    return model.eval()


def double(model: torch.nn.Module) -> torch.nn.Module:
    """Convert the model to fp64 and return it. RMSNorms of transformers are replaced, because they compute in fp32 in any dtype.

    Only cosines and sines of rotary embeddings stay rounded to fp32, in transformers as in Megatron-Core.
    """
    model.double()
    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm") and isinstance(model, PreTrainedModel):
            epsilon = "eps" if hasattr(norm, "eps") else "variance_epsilon"
            norm.forward = lambda x, norm=norm, epsilon=epsilon: F.rms_norm(
                x, x.shape[-1:], norm.weight[: x.shape[-1]], getattr(norm, epsilon)
            )
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, net: SubNetwork | None = None) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] of a Hugging Face or a Megatron-Core model for `tokens()`."""
    ids = tokens()
    if isinstance(model, PreTrainedModel):
        return model(ids).logits
    with use_subnetwork(model, net):
        return model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def masked(model: PreTrainedModel, arch: ModelConfig, net: SubNetwork) -> PreTrainedModel:
    """Copy of a model that computes a sub-network with zeros: the weights that read unused heads, neurons, channels and layers.

    Uses Hugging Face's layout only: query head h belongs to group h // (heads of a group).
    """
    model = copy.deepcopy(model)
    is_gpt2 = isinstance(model, GPT2LMHeadModel)
    base, channels = model.base_model, net.hidden_size
    for embedding in (base.wte, base.wpe) if is_gpt2 else (base.embed_tokens,):
        embedding.weight[:, channels:] = 0
    for layer, choice in zip(base.h if is_gpt2 else base.layers, net.layers, strict=True):
        attention, mlp = (layer.attn.c_proj, layer.mlp.c_proj) if is_gpt2 else (layer.self_attn.o_proj, layer.mlp.down_proj)
        weights = [each.weight.T if is_gpt2 else each.weight for each in (attention, mlp)]  # [out, in]
        for head in range(arch.num_attention_heads):
            group, number = divmod(head, arch.query_heads_per_group)
            if group >= choice.kv_groups or number >= choice.query_heads_per_group:
                weights[0][:, head * arch.kv_channels : (head + 1) * arch.kv_channels] = 0
        weights[1][:, choice.ffn_hidden_size :] = 0
        for tensor in (*weights, attention.bias, mlp.bias):
            if tensor is not None:
                tensor[channels if choice.executed else 0 :] = 0
    for name, norm in base.named_modules():
        if "norm" in name.lower().rsplit(".")[-1] and not name.endswith(("q_norm", "k_norm")) or ".ln_" in f".{name}":
            _narrow(norm, channels)
    return model


def _narrow(norm: torch.nn.Module, channels: int) -> None:
    """Make a norm of transformers normalise the first channels alone. The other channels, which are zero, stay zero."""
    whole = norm.weight.shape[0]
    if not isinstance(norm, torch.nn.LayerNorm):  # RMSNorm: the mean of squares counts the zeros too
        norm.weight.mul_((channels / whole) ** 0.5)
        norm.variance_epsilon *= channels / whole
    elif channels < whole:
        small = copy.deepcopy(norm)
        small.weight, small.bias = (torch.nn.Parameter(tensor[:channels].clone()) for tensor in (norm.weight, norm.bias))
        small.normalized_shape = (channels,)
        norm.forward = lambda x: F.pad(small(x[..., :channels]), (0, whole - channels))
