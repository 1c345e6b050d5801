"""Elastic continued training through Megatron-Bridge, from a sorted checkpoint of a Hugging Face model.

    flextron import hf=Llama-3.2-1B out=run/imported
    flextron importance checkpoint=run/imported data=run/data out=run/sorted
    torchrun --nproc-per-node 8 examples/megatron_bridge/train_elastic.py Llama-3.2-1B run/sorted

Data, optimizer and logging are those of Bridge's recipe. Its model provider gets elastic layers and the sorted weights. The
forward step runs the full model and three random sub-networks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.state import GlobalState

from flextron_mcore.checkpoint.reader import load_model
from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.doors import ElasticTraining, adapt
from flextron_mcore.specs import elastic_layer_spec


def elastic_provider(model: str, info: CheckpointInfo, elastic: ElasticTraining, **options: Any) -> GPTModelProvider:
    """Bridge's provider of a Hugging Face model, with elastic layers and the weights of `info`. options: fields to set in it."""
    provider = AutoBridge.from_hf_pretrained(model).to_megatron_provider(load_weights=False)
    for name, value in options.items():
        setattr(provider, name, value)
    provider.transformer_layer_spec = partial(elastic_layer_spec, space=info.space)
    adapt(provider)

    def load(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        for chunk in chunks:
            elastic.watch(chunk)
            load_model(chunk, info)
        return chunks

    provider.register_pre_wrap_hook(load)
    return provider


def forward_step(
    elastic: ElasticTraining, state: GlobalState, data_iterator: Iterator, model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    """Per-token losses [networks, B, S] on one micro-batch, and the loss function; Bridge logs each network's loss."""
    batch = {name: value.cuda(non_blocking=True) for name, value in next(data_iterator).items() if torch.is_tensor(value)}
    inputs = {"input_ids": batch["tokens"], "position_ids": batch["position_ids"], "labels": batch["labels"]}
    losses = elastic.all_losses(model, state.train_state.step, {**inputs, "attention_mask": None})
    return losses, partial(elastic.loss_function, batch["loss_mask"], range(len(losses)), model.training)


def main(model: str, checkpoint: str) -> None:
    from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
    from megatron.bridge.training.pretrain import pretrain

    info = open_checkpoint(checkpoint)
    config = llama32_1b_pretrain_config()
    elastic = ElasticTraining(info.model, info.space, count=3, seed=config.rng.seed)
    config.model = elastic_provider(model, info, elastic, seq_length=config.dataset.seq_length)

    def step(state: GlobalState, data_iterator: Iterator, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        return forward_step(elastic, state, data_iterator, model)

    pretrain(config, step)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
