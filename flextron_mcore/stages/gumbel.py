"""`flextron gumbel`: training of the model together with one router for all axes (LLaMaFlex)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import open_data
from flextron_mcore.routers.store import kind_of_routers, read_routers
from flextron_mcore.runs.choice import check_table, latency_table
from flextron_mcore.runs.opened import check_space
from flextron_mcore.runs.routers import described_routers, router_training, train_routers
from flextron_mcore.settings.training import GumbelStageSettings
from flextron_mcore.training.checks import check
from flextron_mcore.training.gumbel import GumbelLearner
from flextron_mcore.training.teacher import open_teacher


def run(settings: GumbelStageSettings) -> dict[str, Any]:
    """Train the model of settings.checkpoint and its router of all axes, a new one if it has none; write a checkpoint.

    Call on all ranks. Returns the content of metrics.json, the result of `train_routers` (runs/routers.py).
    """
    info, data = _modulated(settings, open_checkpoint(settings.checkpoint)), open_data(settings.data)
    check_space(settings, info)
    table = latency_table(settings, info)
    check_table(table)
    router = settings.router
    if router.weighted_per_step > settings.targets_per_step:
        raise FlextronError(
            f"router.weighted_per_step={router.weighted_per_step} is not within 1 and "
            f"targets_per_step={settings.targets_per_step}: lower it, or raise targets_per_step"
        )
    described, costs = described_routers(settings, info, table, router.hidden_size)
    described = replace(described, kind="gumbel", uniform=router.uniform)
    choices, started = Choices(info.model, info.space), None
    if kind_of_routers(info.path) == "gumbel":
        before, started = read_routers(info.path, choices)
        if (before.uniform, before.costs) != (described.uniform, described.costs):
            raise FlextronError(
                f"checkpoint={info.path}: its router was trained with router.uniform={str(before.uniform).lower()} and "
                f"costs=[{','.join(before.costs)}]: set the same keys"
            )
    teacher = open_teacher(settings, info, data)
    seq_length = check(settings, info, data, 1 + settings.targets_per_step + (teacher is not None))
    training = router_training(settings, described.choices(choices), costs, described, table)
    learner = GumbelLearner(training, router, started)
    return train_routers(settings, info, data, learner, seq_length, frozen=False, teach=settings.distillation, teacher=teacher)


def _modulated(settings: GumbelStageSettings, info: CheckpointInfo) -> CheckpointInfo:
    """Description of the checkpoint, with modulation added if settings.modulation is true.

    Raises FlextronError for modulation=false if the checkpoint has modulation, which cannot be removed.
    """
    if settings.modulation is False and info.space.modulation:
        raise FlextronError(f"checkpoint={info.path}: has modulation, which its networks need: leave modulation=false out")
    return replace(info, space=replace(info.space, modulation=True)) if settings.modulation else info
