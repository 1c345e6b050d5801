"""Elastic continued training through NeMo 2's `llm.train` (nemo-toolkit 2.7.3, in a separate environment: docs/doors.md).

    python examples/nemo2/train_elastic.py run/sorted run/data STEPS

The forward step runs the full model and three random sub-networks on each micro-batch. The loss that NeMo logs
(`reduced_train_loss`) is the sum of the networks' mean losses (Flextron, eq. 5).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from flextron_mcore.runtime import cpu

cpu.enable()  # does nothing on a machine with CUDA

import megatron.core.optimizer as core_optimizer  # noqa: E402
from lightning.pytorch import Callback  # noqa: E402
from nemo import lightning as nl  # noqa: E402
from nemo.collections import llm  # noqa: E402
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer  # noqa: E402
from nemo.lightning.pytorch.optim import MegatronOptimizerModule  # noqa: E402

from flextron_mcore.checkpoint.reader import load_model  # noqa: E402
from flextron_mcore.checkpoint.store import open_checkpoint  # noqa: E402
from flextron_mcore.data.blend import open_data  # noqa: E402
from flextron_mcore.doors import ElasticTraining, adapt  # noqa: E402
from flextron_mcore.specs import elastic_layer_spec  # noqa: E402

_get_megatron_optimizer = core_optimizer.get_megatron_optimizer


def get_megatron_optimizer(*args: Any, no_weight_decay_cond: None, scale_lr_cond: None, lr_mult: float, **kwargs: Any) -> Any:
    """Call Megatron-Core's function without three arguments that 0.16 lacks, and that NeMo 2.7.3 passes at their defaults."""
    return _get_megatron_optimizer(*args, **kwargs)


core_optimizer.get_megatron_optimizer = get_megatron_optimizer


@dataclass
class ElasticGPTConfig(llm.GPTConfig):
    """NeMo's GPTConfig for an elastic model that starts from a checkpoint of `flextron`."""

    checkpoint: str = ""
    num_subnetworks: int = 3

    def configure_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Build the model with elastic layers and load the checkpoint."""
        info = open_checkpoint(self.checkpoint)
        adapt(self)
        self.transformer_layer_spec = lambda config, vp_stage=None: elastic_layer_spec(config, vp_stage, info.space)
        gpt = super().configure_model(*args, **kwargs)
        load_model(gpt, info)
        gpt.elastic = ElasticTraining(info.model, info.space, self.num_subnetworks, seed=1234)
        gpt.elastic.watch(gpt)
        return gpt


def data_step(batches: Any) -> dict[str, torch.Tensor]:
    """Tensors of the next micro-batch, on the GPU."""
    batch = next(batches)
    batch = batch[0] if isinstance(batch, tuple) else batch
    return {name: value.cuda(non_blocking=True) for name, value in batch.items() if torch.is_tensor(value)}


def forward_step(model: llm.GPTModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Per-token losses [B, S] of a micro-batch, summed over the networks."""
    inputs = {"input_ids": batch["tokens"], "position_ids": batch["position_ids"], "labels": batch["labels"]}
    gpt = model.module
    while hasattr(gpt, "module"):
        gpt = gpt.module
    return gpt.elastic.all_losses(model, model.trainer.global_step, {**inputs, "attention_mask": None}).sum(0)


class PrintLoss(Callback):
    """Print the loss of every step."""

    def on_train_batch_end(self, trainer: nl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        print(
            f"step {trainer.global_step} loss {float(outputs['loss'] if isinstance(outputs, dict) else outputs):.6f}", flush=True
        )


def main(checkpoint: str, data: str, steps: int) -> None:
    arch, prepared = open_checkpoint(checkpoint).model, open_data(data)
    tokenizer = AutoTokenizer(str(prepared.tokenizer))
    config = ElasticGPTConfig(
        checkpoint=checkpoint,
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        seq_length=arch.max_position_embeddings,
        vocab_size=arch.vocab_size,
        share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,
        data_step_fn=data_step,
        forward_step_fn=forward_step,
    )
    paths = {split: [x for d in prepared.domains.values() for x in ("1", getattr(d, split))] for split in ("train", "valid")}
    module = llm.PreTrainingDataModule(
        {"train": paths["train"], "validation": paths["valid"], "test": paths["valid"]},
        seq_length=config.seq_length,
        tokenizer=tokenizer,
        micro_batch_size=4,
        global_batch_size=8,
        num_workers=0,
        split=None,
    )
    trainer = nl.Trainer(
        devices=1,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        strategy=nl.MegatronStrategy(ddp="megatron", ckpt_async_save=False),
        max_steps=steps,
        limit_val_batches=0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        logger=False,
        callbacks=[PrintLoss()],
    )
    optimizer = core_optimizer.OptimizerConfig(optimizer="adam", lr=5e-4, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0)
    optim = MegatronOptimizerModule(optimizer)
    llm.train(llm.GPTModel(config, tokenizer=tokenizer), module, trainer, log=nl.NeMoLogger(log_dir="nemo_log"), optim=optim)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
