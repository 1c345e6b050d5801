"""Checks of a training before anything is written: settings, model, layout and data that do not fit each other."""

from __future__ import annotations

from megatron.core import optimizer, parallel_state

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData, check_tokenizer, check_weights
from flextron_mcore.model import check_layout
from flextron_mcore.settings.sections import DataParallelSettings, EvaluationModelSettings
from flextron_mcore.settings.training import LoopSettings


def check(settings: LoopSettings, info: CheckpointInfo, data: PreparedData, networks: int = 1) -> int:
    """Check what can be checked before anything is written; the sequence length. Raises FlextronError naming the key.

    networks: how many a step runs.
    """
    model = settings.model
    length = sequence_length(model, info, data)
    ranks = parallel_state.get_data_parallel_world_size()
    if model.global_batch_size % (model.micro_batch_size * ranks):
        raise FlextronError(
            f"model.global_batch_size={model.global_batch_size} is not a multiple of model.micro_batch_size="
            f"{model.micro_batch_size} x {ranks} data-parallel rank(s)"
        )
    check_weights(data, settings.data_weights)
    check_layout(info.model, info.space, model, settings.trainer.precision)
    if hasattr(model, "ddp"):
        _check_ddp(model.ddp)
    stages = model.pipeline_model_parallel_size
    micro_batches = model.global_batch_size // (model.micro_batch_size * ranks) * networks
    if model.virtual_pipeline_model_parallel_size and micro_batches % stages:
        raise FlextronError(
            f"model.virtual_pipeline_model_parallel_size: the interleaved schedule needs a multiple of "
            f"model.pipeline_model_parallel_size={stages} micro-batches times networks a step, not {micro_batches}"
        )
    return length


def sequence_length(model: EvaluationModelSettings, info: CheckpointInfo, data: PreparedData) -> int:
    """model.seq_length, by default the model's positions. Raises FlextronError where model, layout and data do not fit."""
    wanted, positions = model.seq_length, info.model.max_position_embeddings
    if wanted is not None and not 1 <= wanted <= positions:
        raise FlextronError(f"model.seq_length={wanted} is not within 1..{positions}, the model's max_position_embeddings")
    if data.vocab_size > info.model.vocab_size:
        raise FlextronError(
            f"data={data.path}: its tokenizer has {data.vocab_size} tokens, the model's vocabulary {info.model.vocab_size}: "
            "prepare the data with the model's tokenizer"
        )
    check_tokenizer(data, info.tokenizer)
    length = wanted or positions
    if model.sequence_parallel and length % model.tensor_model_parallel_size:
        raise FlextronError(
            f"model.sequence_parallel=true: model.tensor_model_parallel_size={model.tensor_model_parallel_size} does not "
            f"divide the sequence length {length}: set model.seq_length"
        )
    return length


def duration(max_time: str | None) -> float | None:
    """Seconds of trainer.max_time, days:hours:minutes:seconds as in NeMo."""
    if max_time is None:
        return None
    days, hours, minutes, seconds = map(int, max_time.split(":"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _check_ddp(ddp: DataParallelSettings) -> None:
    if ddp.overlap_param_gather and not (ddp.use_distributed_optimizer and ddp.overlap_grad_reduce):
        raise FlextronError(
            "model.ddp.overlap_param_gather=true needs model.ddp.use_distributed_optimizer=true and "
            "model.ddp.overlap_grad_reduce=true"
        )
    if ddp.use_distributed_optimizer and optimizer.USING_PYTORCH_OPTIMIZER:
        raise FlextronError(
            "model.ddp.use_distributed_optimizer=true needs the FusedAdam of Transformer Engine or apex on a GPU: "
            "Megatron-Core cannot load the state of torch's"
        )
