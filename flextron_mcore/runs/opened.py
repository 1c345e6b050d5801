"""Checkpoint and data that a stage reads: opened, and checked against each other and against the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData, open_data, valid_datasets
from flextron_mcore.evaluation.evaluator import Evaluator
from flextron_mcore.model import PRECISIONS, check_layout, loaded_model
from flextron_mcore.runs.memory import memory_line
from flextron_mcore.runs.terminal import say
from flextron_mcore.runtime.distributed import device
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import ElasticSpace
from flextron_mcore.training.checks import sequence_length


@dataclass(frozen=True)
class Opened:
    """Checkpoint and data that fit each other.

    Attributes:
        info: description of the checkpoint.
        data: prepared data.
        precision: precision of the computation, fp32 or bf16.
        seq_length: tokens of a sample.
        memory: line to print about the memory that the stage needs.
    """

    info: CheckpointInfo
    data: PreparedData
    precision: str
    seq_length: int
    memory: str

    @classmethod
    def of(cls, settings: StageSettings, info: CheckpointInfo, data: PreparedData) -> Opened:
        """Check a checkpoint and data against each other and against the layout.

        Args:
            settings: settings of the stage.
            info: checkpoint.
            data: prepared data.

        Raises:
            FlextronError: the tokenizers, the sequence length or the parallel layout do not fit, or memory is too small.
        """
        computed = precision(settings, info)
        check_layout(info.model, info.space, settings.model, computed)
        length = sequence_length(settings.model, info, data)
        return cls(info, data, computed, length, memory_line(settings, info))


def open_evaluation(settings: StageSettings) -> Opened:
    """Open settings.checkpoint and settings.data.

    Raises FlextronError if one is missing or damaged, or if they do not fit each other or the settings.
    """
    info, data = open_checkpoint(settings.checkpoint), open_data(settings.data)
    check_space(settings, info)
    return Opened.of(settings, info, data)


def evaluator(settings: StageSettings, opened: Opened, cache: Path, progress: Callable[[str], None]) -> Evaluator:
    """Print opened.memory, load the model and make an evaluator of networks on the validation split. Call on all ranks.

    Args:
        settings: settings of the stage; `limit_val_batches` limits the number of micro-batches of each domain.
        opened: checkpoint and data.
        cache: directory for the indices of the samples.
        progress: function called with "DOMAIN: NETWORK" after each evaluation of a network on a domain.
    """
    say(opened.memory)
    datasets = valid_datasets(opened.data, opened.seq_length, settings.seed, cache)
    model = loaded_model(settings.model, opened.info, opened.precision)
    return Evaluator(model, datasets, opened.seq_length, settings.model.micro_batch_size, settings.limit_val_batches, progress)


def precision(settings: StageSettings, info: CheckpointInfo) -> str:
    """Precision of the computation: trainer.precision, by default the checkpoint's, or fp32 for one that is stored in fp16.

    Prints a line where the default is bf16 on a CPU without instructions for it: one without AVX-512 took 7 times as long.
    """
    if settings.trainer.precision:
        return settings.trainer.precision
    found = info.dtype if info.dtype in PRECISIONS else "fp32"
    if found == "bf16" and device().type == "cpu" and not _bf16_instructions():
        say("computing in bf16, as the checkpoint is stored, which this CPU is slow at: trainer.precision=fp32 is faster")
    return found


def _bf16_instructions() -> bool:
    """True if PyTorch multiplies bf16 matrices with oneDNN on this CPU, not in its own loops."""
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_space(settings: StageSettings, info: CheckpointInfo) -> None:
    """Raise FlextronError if a key of settings.space differs from the checkpoint's elastic space; null keys fit any space."""
    have = info.space.to_dict()
    if settings.space.multiple is not None:
        ElasticSpace.from_dict(info.model, {**have, "multiple": settings.space.multiple})
    wanted = {k: v for k, v in asdict(settings.space).items() if v is not None}
    for name in ("granularity", "attention_unit", *have):
        if name not in wanted:
            continue
        value = wanted[name]
        if isinstance(value, list):
            value = ElasticSpace.from_dict(info.model, {**have, name: value}).to_dict()[name]
        if value != have[name]:
            raise FlextronError(
                f"checkpoint={info.path}: is of another space: its {name} is {have[name]}, not {value}; "
                "leave space.* out, or sort the checkpoint for that space with `flextron importance`"
            )


def check_widths_only(info: CheckpointInfo, what: str) -> None:
    """Raise FlextronError if hidden size or depth is elastic in the checkpoint's space.

    what: command or selector that chooses heads and FFN neurons only, for the message.
    """
    for axis in ("hidden_size", "depth"):
        if len(sizes := getattr(info.space, axis)) > 1:
            raise FlextronError(
                f"checkpoint={info.path}: its space.{axis} is elastic, {list(sizes)}, and {what} chooses heads and neurons only: "
                "use `flextron gumbel`, or sort it for another space with `flextron importance`"
            )


def check_not_modulated(info: CheckpointInfo) -> None:
    """Raise FlextronError for a checkpoint with modulation, which token routing does not support.

    Modulation multiplies outputs of blocks with learned gains that depend on the size of one network for all tokens.
    """
    if info.space.modulation:
        raise FlextronError(
            f"checkpoint={info.path}: was trained with modulation, which token routing does not support: use "
            "`flextron router kind=static`, or `flextron gumbel`"
        )
