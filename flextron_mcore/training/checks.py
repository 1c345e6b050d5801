"""Checks that settings, model, parallel layout and data of a training fit each other, made before it writes anything."""

from __future__ import annotations

import os

from megatron.core import optimizer, parallel_state

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData, check_tokenizer, check_weights
from flextron_mcore.data.tokenizer import read_vocabulary
from flextron_mcore.model import check_layout
from flextron_mcore.settings.sections import DataParallelSettings, EvaluationModelSettings
from flextron_mcore.settings.training import LoopSettings
from flextron_mcore.training.boards import check_boards
from flextron_mcore.training.options import check_length, check_options


def check(settings: LoopSettings, info: CheckpointInfo, data: PreparedData, networks: int = 1) -> int:
    """Check that settings, model, layout and data of a training fit each other, and return the sequence length in tokens.

    Raises FlextronError, which names the key to change.

    Args:
        settings: settings of the stage.
        info: architecture, elastic space and tokenizer of the checkpoint.
        data: prepared data set.
        networks: number of networks that a step runs every micro-batch through.
    """
    model = settings.model
    length = sequence_length(model, info, data)
    ranks = parallel_state.get_data_parallel_world_size()
    check_options(model, settings.trainer.max_steps, ranks, networks)
    check_weights(data, settings.data_weights)
    check_boards(settings.exp_manager)
    check_layout(info.model, info.space, model, settings.trainer.precision)
    if hasattr(model, "ddp"):
        _check_ddp(model.ddp)
    return length


def sequence_length(model: EvaluationModelSettings, info: CheckpointInfo, data: PreparedData) -> int:
    """Sequence length in tokens: model.seq_length, by default the smaller of max_position_embeddings and 4096.

    Raises FlextronError if the length does not suit the model or its layout, or the data were prepared with another tokenizer.

    Args:
        model: model section of the settings, with the layout.
        info: model and tokenizer of the checkpoint.
        data: prepared data set, whose tokenizer must be the model's.
    """
    wanted, positions = model.seq_length, info.model.max_position_embeddings
    if wanted is not None and not 1 <= wanted <= positions:
        raise FlextronError(f"model.seq_length={wanted} is not within 1..{positions}, the model's max_position_embeddings")
    check_tokenizer(data, info.tokenizer)
    if data.vocab_size > info.model.vocab_size:
        vocabulary = read_vocabulary(data.tokenizer)
        beyond = vocabulary and vocabulary.beyond(info.model.vocab_size)
        named = f", the first one beyond is {beyond[0][:40]!r} with id {beyond[1]}" if beyond else ""
        remedy = "import it with resize_vocabulary=true" if info.hf_config else "prepare the data with the model's tokenizer"
        raise FlextronError(
            f"data={data.path}: its tokenizer has {data.vocab_size} tokens, the model's vocabulary "
            f"{info.model.vocab_size}{named}: {remedy}"
        )
    length = wanted or info.model.default_length
    check_length(model, length)
    return length


def duration(max_time: str | None) -> float | None:
    """Convert trainer.max_time, "days:hours:minutes:seconds" as in NeMo, to seconds; None (no limit) stays None."""
    if max_time is None:
        return None
    days, hours, minutes, seconds = map(int, max_time.split(":"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def end_of_job() -> tuple[float | None, float | None]:
    """(time at which training stops, time at which its job ends), in seconds since 1970; None outside of a job of `launch`.

    The job's script sets $FLEXTRON_STOP_AT and $FLEXTRON_JOB_END: a process cannot know how long the job ran before it, for
    example to pull an image. Raises FlextronError for another value than a whole number.
    """
    return _time("FLEXTRON_STOP_AT"), _time("FLEXTRON_JOB_END")


def _time(name: str) -> float | None:
    """Time in an environment variable, seconds since 1970; None if it is not set or empty. FlextronError if no whole number."""
    text = os.environ.get(name)
    if text and not text.isdecimal():
        raise FlextronError(f"{name}={text}: is not a number of seconds since 1970: unset this variable")
    return float(text) if text else None


def _check_ddp(ddp: DataParallelSettings) -> None:
    """Raise FlextronError for the distributed optimizer where no optimizer that it needs is installed."""
    if ddp.use_distributed_optimizer and optimizer.USING_PYTORCH_OPTIMIZER:
        raise FlextronError(
            "model.ddp.use_distributed_optimizer=true needs the FusedAdam of Transformer Engine or apex on a GPU: "
            "Megatron-Core cannot load the state of torch's: set it to false"
        )
