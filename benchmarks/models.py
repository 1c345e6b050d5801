"""Models that the benchmarks compare: elastic models, and dense models of a sub-network's shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from flextron_mcore.config import ModelConfig
from flextron_mcore.layers.attention import SDPACoreAttention
from flextron_mcore.model import build_model, gpt_model, transformer_config
from flextron_mcore.runtime.distributed import device
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork
from flextron_mcore.specs import backend_classes

BATCH, LENGTH = 2, 512
_SIZE = dict(num_layers=2, hidden_size=512, num_attention_heads=16, vocab_size=1024, max_position_embeddings=LENGTH)
LLAMA = ModelConfig(**_SIZE, ffn_hidden_size=1408)
LLAMA_WORDY = replace(LLAMA, vocab_size=16384)
LLAMA_TIED = replace(LLAMA_WORDY, share_embeddings_and_output_weights=True)
LLAMA_DEEP = replace(LLAMA, num_layers=4)
LLAMA_GQA = ModelConfig(**_SIZE, ffn_hidden_size=1408, num_query_groups=4)
GPT2 = ModelConfig(
    **_SIZE, activation="gelu_tanh", normalization="layernorm", position_embedding_type="learned_absolute", bias=True
)  # fmt: skip
DESCRIPTION = (
    "{num_layers} layers, hidden {hidden_size}, {num_attention_heads} heads, FFN {ffn_hidden_size} (llama) or {gpt2} (gpt2), "
    "vocabulary {vocab_size}; {batch} x {length} tokens, fp32, DDP with main_grad"
).format(**LLAMA.to_dict(), gpt2=GPT2.ffn_hidden_size, batch=BATCH, length=LENGTH)


def elastic(model: ModelConfig, space: ElasticSpace) -> torch.nn.Module:
    """Elastic model in Megatron-Core's DDP."""
    return _wrapped(build_model(model, space))


def dense(model: ModelConfig, net: SubNetwork, fully_stock: bool = False) -> torch.nn.Module:
    """Dense GPTModel of a sub-network's shape, of Megatron-Core's own layers, in Megatron-Core's DDP.

    Args:
        model: architecture of the full model.
        net: sub-network; skipped layers are left out.
        fully_stock: False replaces the core attention and the norms of Megatron-Core's local spec by those of the elastic layers,
            so that only slicing differs; True keeps them.
    """
    choices = [choice for choice in net.layers if choice.executed]
    shapes = [_cut(model, choice, net.hidden_size, len(choices)) for choice in choices]
    configs = [transformer_config(shape) for shape in shapes]
    layer = get_gpt_layer_local_spec(normalization=configs[0].normalization)
    spec = layer
    if not fully_stock:
        (norm, _), parts = backend_classes(configs[0].normalization), layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = norm
        parts.self_attention.submodules.core_attention = SDPACoreAttention
        spec = TransformerBlockSubmodules(layer_specs=[layer] * len(choices), layer_norm=norm)
    gpt = gpt_model(shapes[0], configs[0], spec)
    for i, config in enumerate(configs):
        if choices[i] != choices[0]:
            gpt.decoder.layers[i] = build_module(layer, config=config, layer_number=i + 1)
    return _wrapped(gpt.to(device()))


def _cut(model: ModelConfig, choice: LayerChoice, hidden_size: int, num_layers: int) -> ModelConfig:
    """Architecture with `num_layers` layers of the widths of `choice`; the size of a head does not change."""
    return replace(
        model,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_attention_heads=choice.num_attention_heads,
        num_query_groups=choice.kv_groups,
        ffn_hidden_size=choice.ffn_hidden_size,
    )


def _wrapped(model: Any) -> torch.nn.Module:
    """Model in training mode, in DDP with fp32 gradient buffers."""
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    ddp.zero_grad_buffer()
    return ddp.train()


def micro_batch(vocab_size: int) -> dict[str, torch.Tensor]:
    """Micro-batch of random tokens: tokens, labels, position_ids and loss_mask, BATCH x LENGTH each, on this rank's device."""
    tokens = torch.randint(0, vocab_size, (BATCH, LENGTH + 1))
    values = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    values["position_ids"] = torch.arange(LENGTH).expand(BATCH, -1)
    values["loss_mask"] = torch.ones(BATCH, LENGTH)
    return {name: tensor.to(device()) for name, tensor in values.items()}


def forward_backward(model: torch.nn.Module, batch: dict[str, torch.Tensor], with_mask: bool = False) -> Callable[[], None]:
    """Function that runs the model forward and backward, from the sum of all token losses.

    Args:
        model: the model.
        batch: micro-batch.
        with_mask: True passes a causal mask, which the fully stock model needs.
    """
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device()).triu(1)[None, None] if with_mask else None

    def run() -> None:
        model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"]).sum().backward()

    return run


def prefill(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Function that runs the model forward to its logits, without gradients."""

    @torch.no_grad()
    def run() -> None:
        model(batch["tokens"], batch["position_ids"], None)

    return run
