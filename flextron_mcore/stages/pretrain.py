"""`flextron pretrain`: a parent model from scratch, for the quickstart and for baselines."""

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


def run(config: PretrainSettings) -> dict[str, Any]:
    """Train the full model of config.model."""
    data = open_data(config.data)
    architecture = {each.name: getattr(config.model, each.name) for each in fields(ArchitectureSettings)}
    architecture["vocab_size"] = architecture["vocab_size"] or data.vocab_size
    model = ModelConfig.from_dict(architecture)
    space = ElasticSpace.from_dict(model, asdict(config.space))
    info = CheckpointInfo(model, space, dtype=config.trainer.precision)
    seq_length = check(config, info, data)
    full = {"full": uniform_family(model, space)["full"]}
    with resumable_output(config, info, data) as out:
        phase = Phase(networks=lambda step: [None], validation=lambda step: full)
        figures = train(config, out, info, data, phase, seq_length)
        return write_metrics(out, "pretrain", figures)
