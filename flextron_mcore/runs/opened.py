"""The checkpoint and the data of a command, opened and held against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData, open_data, valid_datasets
from flextron_mcore.evaluation.evaluator import Evaluator
from flextron_mcore.model import PRECISIONS, check_layout, loaded_model
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import ElasticSpace
from flextron_mcore.training.checks import sequence_length


@dataclass(frozen=True)
class Opened:
    """A checkpoint and data that fit each other. precision: to compute in. seq_length: tokens of a sample."""

    info: CheckpointInfo
    data: PreparedData
    precision: str
    seq_length: int

    @classmethod
    def of(cls, settings: StageSettings, info: CheckpointInfo, data: PreparedData) -> Opened:
        """Raises FlextronError where checkpoint, data and layout do not fit each other."""
        computed = precision(settings, info)
        check_layout(info.model, info.space, settings.model, computed)
        return cls(info, data, computed, sequence_length(settings.model, info, data))


def open_evaluation(settings: StageSettings) -> Opened:
    """The checkpoint and the data of a stage that evaluates networks. Raises FlextronError where they do not fit."""
    info, data = open_checkpoint(settings.checkpoint), open_data(settings.data)
    check_space(settings, info)
    return Opened.of(settings, info, data)


def evaluator(settings: StageSettings, opened: Opened, cache: Path, progress: Callable[[str], None]) -> Evaluator:
    """The loaded model on the validation split, of which settings.limit_val_batches are used. cache: directory for indices."""
    datasets = valid_datasets(opened.data, opened.seq_length, settings.seed, cache)
    model = loaded_model(settings.model, opened.info, opened.precision)
    return Evaluator(model, datasets, opened.seq_length, settings.model.micro_batch_size, settings.limit_val_batches, progress)


def precision(settings: StageSettings, info: CheckpointInfo) -> str:
    """trainer.precision, or else as stored."""
    return settings.trainer.precision or (info.dtype if info.dtype in PRECISIONS else "fp32")


def check_space(settings: StageSettings, info: CheckpointInfo) -> None:
    """Raise FlextronError when the configuration asks for another space than the checkpoint's."""
    have = info.space.to_dict()
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
    """Raise FlextronError where hidden size or depth is elastic, of which `what` knows nothing."""
    for axis in ("hidden_size", "depth"):
        if len(sizes := getattr(info.space, axis)) > 1:
            raise FlextronError(
                f"checkpoint={info.path}: its space.{axis} is elastic, {list(sizes)}, and {what} chooses heads and neurons only: "
                "use `flextron gumbel`, or sort it for another space with `flextron importance`"
            )


def check_not_modulated(info: CheckpointInfo) -> None:
    """Raise FlextronError where gains depend on the network, which tokens that choose for themselves do not have."""
    if info.space.modulation:
        raise FlextronError(
            f"checkpoint={info.path}: has modulation, gains that depend on the one network in use: its tokens cannot choose for "
            "themselves; use kind=static, or `flextron gumbel`"
        )
