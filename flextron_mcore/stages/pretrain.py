"""`flextron pretrain`: training of a dense parent model from scratch."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import ModelConfig
from flextron_mcore.data.blend import open_data
from flextron_mcore.evaluation.family import uniform_family
from flextron_mcore.runs.output import write_metrics
from flextron_mcore.runs.resume import resumable_output
from flextron_mcore.settings.sections import ArchitectureSettings
from flextron_mcore.settings.training import PretrainSettings
from flextron_mcore.space import ElasticSpace
from flextron_mcore.training.checks import check
from flextron_mcore.training.loop import Phase, train


def run(settings: PretrainSettings) -> dict[str, Any]:
    """Train the model that settings.model describes, and write a checkpoint with the space of settings.space.

    Call on all ranks. Returns the content of metrics.json, the results of `train`.
    """
    data = open_data(settings.data)
    architecture = {each.name: getattr(settings.model, each.name) for each in fields(ArchitectureSettings)}
    architecture["vocab_size"] = architecture["vocab_size"] or data.vocab_size
    model = ModelConfig.from_dict(architecture)
    space = ElasticSpace.from_dict(model, asdict(settings.space))
    info = CheckpointInfo(model, space, dtype=settings.trainer.precision)
    seq_length = check(settings, info, data)
    full = {"full": uniform_family(model, space)["full"]}
    with resumable_output(settings, info, data) as out:
        phase = Phase(networks=lambda step: [None], validation=lambda step: full)
        figures = train(settings, out, info, data, phase, seq_length)
        return write_metrics(out, "pretrain", figures)
