"""Checks of a training's keys alone, which need neither a checkpoint nor its processes: `launch` makes them, too. No torch."""

from __future__ import annotations

from flextron_mcore.config import FlextronError
from flextron_mcore.settings.sections import DataParallelSettings, FrozenModelSettings, LayoutSettings
from flextron_mcore.training.rampup import BatchSizes


def check_options(model: FrozenModelSettings, steps: int, ranks: int, networks: int) -> None:
    """Raise FlextronError, which names the key to change, for keys of a training's `model` section that contradict each other.

    Args:
        model: section `model` of the settings.
        steps: number of steps of the whole training.
        ranks: number of data-parallel ranks.
        networks: number of networks that a step runs every micro-batch through.
    """
    step = model.micro_batch_size * ranks
    if model.global_batch_size % step:
        raise FlextronError(
            f"model.global_batch_size={model.global_batch_size} is not a multiple of model.micro_batch_size="
            f"{model.micro_batch_size} x {ranks} data-parallel rank(s): use {-(-model.global_batch_size // step) * step}"
        )
    batches = BatchSizes(model, steps)
    batches.check(model.micro_batch_size, ranks)
    if hasattr(model, "ddp"):
        _check_ddp(model.ddp)
    if hasattr(model, "optim") and model.optim.min_lr > model.optim.lr:
        raise FlextronError(
            f"model.optim.min_lr={model.optim.min_lr:g} is above model.optim.lr={model.optim.lr:g}, from which it falls: lower it"
        )
    stages = model.pipeline_model_parallel_size
    micro_batches = next((n for size in batches.sizes if (n := size // step * networks) % stages), 0)
    if model.virtual_pipeline_model_parallel_size and micro_batches:
        raise FlextronError(
            f"model.virtual_pipeline_model_parallel_size: the interleaved schedule needs a multiple of "
            f"model.pipeline_model_parallel_size={stages} micro-batches times networks a step, not {micro_batches}: change "
            "model.global_batch_size"
        )


def check_length(model: LayoutSettings, length: int) -> None:
    """Raise FlextronError if sequence parallelism cannot split samples of `length` tokens."""
    if model.sequence_parallel and length % model.tensor_model_parallel_size:
        raise FlextronError(
            f"model.sequence_parallel=true: model.tensor_model_parallel_size={model.tensor_model_parallel_size} does not "
            f"divide the sequence length {length}: set model.seq_length"
        )


def _check_ddp(ddp: DataParallelSettings) -> None:
    if ddp.overlap_param_gather and not (ddp.use_distributed_optimizer and ddp.overlap_grad_reduce):
        raise FlextronError(
            "model.ddp.overlap_param_gather=true needs model.ddp.use_distributed_optimizer=true and "
            "model.ddp.overlap_grad_reduce=true"
        )
