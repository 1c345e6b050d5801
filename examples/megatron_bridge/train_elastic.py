"""Elastic continued training through Megatron-Bridge 0.6, from a sorted checkpoint of a Hugging Face model.

    flextron import hf=Llama-3.2-1B out=run/imported
    flextron importance checkpoint=run/imported data=run/data out=run/sorted
    torchrun --nproc-per-node 8 examples/megatron_bridge/train_elastic.py Llama-3.2-1B run/sorted run/data 2000 run/bridge

Bridge's model provider gets elastic layers and the sorted weights. The forward step runs the full model and three random
sub-networks. Started again with the same arguments, it continues from the newest checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    GPTDatasetConfig,
    LoggerConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.state import GlobalState

from flextron_mcore.checkpoint.reader import load_model
from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.data.blend import open_data
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


def recipe(provider: GPTModelProvider, data: str, steps: int, out: str) -> ConfigContainer:
    """Bridge's configuration of a run on data that `flextron prepare` wrote, with checkpoints in `out`."""
    prepared = open_data(data)
    paths = {split: [getattr(domain, split) for domain in prepared.domains.values()] for split in ("train", "valid")}
    equal = [1.0] * len(prepared.domains)
    return ConfigContainer(
        model=provider,
        train=TrainingConfig(train_iters=steps, micro_batch_size=4, global_batch_size=256),
        validation=ValidationConfig(eval_iters=0),
        optimizer=OptimizerConfig(
            optimizer="adam", lr=1e-4, min_lr=1e-5, weight_decay=0.1, adam_beta2=0.95, use_distributed_optimizer=True
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine", lr_warmup_iters=steps // 50, start_weight_decay=0.1, end_weight_decay=0.1
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        dataset=GPTDatasetConfig(
            seq_length=provider.seq_length,
            random_seed=1234,
            blend_per_split=[(paths["train"], equal), (paths["valid"], equal), None],
            path_to_cache=f"{out}/cache",
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,  # the attention applies the causal mask itself
            dataloader_type="single",
        ),
        logger=LoggerConfig(log_interval=1),
        tokenizer=TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(prepared.tokenizer)),
        checkpoint=CheckpointConfig(save=out, load=out, save_interval=500),
        rng=RNGConfig(seed=1234),
        mixed_precision="bf16_mixed",
    )


def main(model: str, checkpoint: str, data: str, steps: int, out: str) -> None:
    info = open_checkpoint(checkpoint)
    elastic = ElasticTraining(info.model, info.space, count=3, seed=1234)
    provider = elastic_provider(model, info, elastic, seq_length=info.model.max_position_embeddings)

    def step(state: GlobalState, data_iterator: Iterator, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        return forward_step(elastic, state, data_iterator, model)

    pretrain(recipe(provider, data, steps, out), step)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
