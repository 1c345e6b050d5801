"""Compensation of a network for an export: calibration text opened, projections refitted, losses before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choosing import Network
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData, open_data, train_dataset, valid_datasets
from flextron_mcore.evaluation.perplexity import evaluate, mean
from flextron_mcore.exports.compensation import install, narrowed, passes, refit
from flextron_mcore.model import check_layout, loaded_model
from flextron_mcore.pipeline.batches import count_batches, counted_share
from flextron_mcore.runs.memory import calibration_line
from flextron_mcore.runs.output import discard
from flextron_mcore.runs.terminal import progress_bar, say
from flextron_mcore.settings.stages import ExportSettings, FamilySettings
from flextron_mcore.space import SubNetwork
from flextron_mcore.training.checks import sequence_length


@dataclass(frozen=True)
class Calibration:
    """Checkpoint and text that a network is compensated with.

    Attributes:
        info: checkpoint.
        data: prepared data.
        seq_length: tokens of a sample.
        memory: line to print about the memory that compensation needs.
    """

    info: CheckpointInfo
    data: PreparedData
    seq_length: int
    memory: str


@dataclass(frozen=True)
class Compensated:
    """Result of `compensate`.

    Attributes:
        refitted: {name in the full model: tensor of the sub-network}, for `Job.refitted`; None for a plain slice.
        text: sentence for the model card: number of projections and tokens, losses before and after; None for a plain slice.
        figures: samples, tokens, number of projections, and losses, for metrics.json.
        model: this rank's chunks of the model with refitted weights; None for a plain slice.
    """

    refitted: Mapping[str, torch.Tensor] | None = None
    text: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    model: Sequence[torch.nn.Module] | None = None


NOT_COMPENSATED = Compensated()


def check_calibration(settings: ExportSettings | FamilySettings) -> None:
    """Raise FlextronError if compensate=true has no text to calibrate on."""
    if settings.data is None:
        raise FlextronError("compensate=true: needs text to calibrate on: give data=, a directory that `flextron prepare` wrote")


def open_calibration(settings: ExportSettings, info: CheckpointInfo, net: SubNetwork) -> Calibration | None:
    """Open settings.data for compensation; None, with a line that says so, for a network that has all heads and neurons.

    Raises FlextronError if there is no data, if it does not fit the checkpoint or the layout, or if memory is too small.

    Args:
        settings: settings of the stage.
        info: checkpoint.
        net: network to export.
    """
    check_calibration(settings)
    data = open_data(settings.data)
    if not narrowed(info.model, net):
        say("compensate=true: this network has all heads and neurons in its layers: nothing to compensate")
        return None
    check_layout(info.model, info.space, settings.model)
    length = sequence_length(settings.model, info, data)
    return Calibration(info, data, length, calibration_line(settings, info, net))


def compensate(settings: ExportSettings, calibration: Calibration, net: SubNetwork, cache: Path) -> Compensated:
    """Refit a network's projections in fp32, and measure its validation loss before and after. Call on all ranks.

    Args:
        settings: settings of the stage.
        calibration: checkpoint and text.
        net: network to export.
        cache: directory for the indices of the samples, removed at the end.
    """
    info, length, size = calibration.info, calibration.seq_length, settings.model.micro_batch_size
    dataset = train_dataset(calibration.data, length, settings.samples, settings.seed, cache)
    held_out = valid_datasets(calibration.data, length, settings.seed, cache)
    model = loaded_model(settings.model, info, "fp32")
    limit = settings.limit_val_batches and settings.limit_val_batches * size

    def losses(networks: Mapping[str, Network]) -> dict[str, float]:
        with progress_bar(total=len(networks) * len(held_out), desc="validation", unit="evaluation") as bar:
            found = evaluate(model, held_out, networks, length, size, limit, lambda _: bar.update())
        return {name: mean(each) for name, each in found.items()}

    loss = losses({"full": None, "cut": net})
    weights = sum(parameter.nbytes for chunk in model for parameter in chunk.parameters())
    parts, count = passes(model, net, weights), count_batches(settings.samples, size)
    with progress_bar(total=count * len(model) * len(parts), desc="compensation", unit="batch") as bar:
        batches = partial(counted_share, dataset, settings.samples, size, bar)
        refitted, tokens = refit(model, net, parts, batches, count, length, size)
    install(model, net, refitted)
    loss |= losses({"compensated": net})
    discard(cache)
    blocks = len(narrowed(info.model, net))
    text = (
        f"{blocks} projections refitted by least squares on {tokens:,} tokens; held-out loss {loss['cut']:.3f} before, "
        f"{loss['compensated']:.3f} after, full model {loss['full']:.3f} nats per token"
    )
    say(f"export: {text}")
    if loss["compensated"] >= loss["cut"]:
        say("export: compensation does not lower the loss: raise samples, or leave compensate=true out")
    figures = {"samples": settings.samples, "tokens": tokens, "projections": blocks, "loss": loss}
    return Compensated(refitted, text, figures, model)
