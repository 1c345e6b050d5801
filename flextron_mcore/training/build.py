"""Model in training: this rank's chunks in Megatron-Core's DDP, with its optimizer and learning-rate schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from flextron_mcore.checkpoint.reader import load_model
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.model import PRECISIONS, build_chunks
from flextron_mcore.runtime.compat import count_padding
from flextron_mcore.settings.sections import DataParallelSettings, OptimizerSettings, TrainerSettings, TrainingModelSettings
from flextron_mcore.training.learner import Figures


class TrainedModel:
    """Model chunks of this rank (one for each virtual pipeline stage) in DDP, with optimizer and learning-rate schedule.

    Build it and call its methods on all ranks.

    Args:
        model: settings of parallel layout, optimizer and DDP.
        trainer: settings of precision and number of steps.
        info: architecture and elastic space. Its `path` is the checkpoint with the weights; None for a random initialisation.
    """

    def __init__(self, model: TrainingModelSettings, trainer: TrainerSettings, info: CheckpointInfo) -> None:
        self.overlap = model.ddp.overlap_param_gather
        self.chunks = _distributed(_loaded(model, trainer.precision, info), model.ddp)
        self.optimizer = _optimizer(self.chunks, model, trainer.precision)
        self.scheduler = _scheduler(self.optimizer, model.optim, trainer.max_steps)
        config = self.chunks[0].config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if model.ddp.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def zero_grad(self) -> None:
        """Clear the gradients before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self) -> Figures:
        """Update the weights from the gradients.

        Returns {"learning_rate": rate of this step, "grad_norm": L2 norm of the gradients before clipping, or None}.
        """
        learning_rate = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return {"learning_rate": learning_rate, "grad_norm": None if grad_norm is None else float(grad_norm)}

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Context in which all parameters are gathered over data-parallel ranks, for evaluation and checkpoints.

        With overlap_param_gather, DDP gathers each module's parameters in the forward pre-hook of a training step only.
        """
        for chunk in self.chunks if self.overlap else ():
            chunk.disable_forward_pre_hook()
        try:
            yield
        finally:
            for chunk in self.chunks if self.overlap else ():
                chunk.enable_forward_pre_hook()


def _loaded(model: TrainingModelSettings, precision: str, info: CheckpointInfo) -> list[torch.nn.Module]:
    """Build this rank's chunks, with the weights of the checkpoint `info.path`, or random ones if that is None."""
    chunks = build_chunks(info.model, info.space, model, precision, initialize=info.path is None)
    if info.path is not None:
        for gpt in chunks:
            load_model(gpt, info)
    return [Float16Module(gpt.config, gpt) if precision == "bf16" else gpt for gpt in chunks]


def _distributed(chunks: list[torch.nn.Module], options: DataParallelSettings) -> list[DistributedDataParallel]:
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        bucket_size=options.bucket_size,
        use_distributed_optimizer=options.use_distributed_optimizer,
    )
    first = chunks[0].config
    wrapped = [DistributedDataParallel(first, config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    for chunk in wrapped:
        count_padding(chunk)
        chunk.broadcast_params()
    return wrapped


def _optimizer(chunks: list[DistributedDataParallel], model: TrainingModelSettings, precision: str) -> MegatronOptimizer:
    optim = model.optim
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=precision == "bf16",
        params_dtype=PRECISIONS[precision],
        use_distributed_optimizer=model.ddp.use_distributed_optimizer,
        overlap_param_gather=model.ddp.overlap_param_gather,
    )
    return get_megatron_optimizer(config, chunks)


def _scheduler(optimizer: MegatronOptimizer, optim: OptimizerSettings, max_steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=min(optim.sched.warmup_steps, max_steps - 1),
        lr_decay_steps=max_steps,
        lr_decay_style=optim.sched.name,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=max_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )
