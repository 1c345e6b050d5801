"""`flextron gumbel`: the model and one router for all axes, trained in one phase (LLaMaFlex)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import open_data
from flextron_mcore.routers.store import kind_of_routers, read_routers
from flextron_mcore.runs.choice import check_table, latency_table
from flextron_mcore.runs.opened import check_space
from flextron_mcore.runs.routers import described_routers, train_routers
from flextron_mcore.settings.training import GumbelStageSettings
from flextron_mcore.training.checks import check
from flextron_mcore.training.gumbel import GumbelLearner
from flextron_mcore.training.router import RouterTraining


def run(config: GumbelStageSettings) -> dict[str, Any]:
    """Train the model of config.checkpoint, and a router, which starts from the checkpoint's where it has one of this kind."""
    info, data = _modulated(config, open_checkpoint(config.checkpoint)), open_data(config.data)
    check_space(config, info)
    table = latency_table(config, info)
    check_table(table)
    router = config.router
    if router.weighted_per_step > config.targets_per_step:
        raise FlextronError(
            f"router.weighted_per_step={router.weighted_per_step} is not within 1 and targets_per_step={config.targets_per_step}"
        )
    described, costs = described_routers(config, info, table, router.hidden_size)
    described = replace(described, kind="gumbel", uniform=router.uniform)
    blocks, started = Choices(info.model, info.space), None
    if kind_of_routers(info.path) == "gumbel":
        before, started = read_routers(info.path, blocks)
        if (before.uniform, before.costs) != (described.uniform, described.costs):
            raise FlextronError(
                f"checkpoint={info.path}: its router was trained with router.uniform={str(before.uniform).lower()} and "
                f"costs={list(before.costs)}"
            )
    seq_length = check(config, info, data, 1 + config.targets_per_step)
    training = RouterTraining(
        described.choices(blocks),
        costs,
        described,
        config.targets_per_step,
        config.seed,
        config.trainer.max_steps,
        table.to_dict() if table else None,
    )
    learner = GumbelLearner(training, router, started)
    return train_routers(config, info, data, learner, seq_length, frozen=False, teach=config.distillation)


def _modulated(config: GumbelStageSettings, info: Any) -> Any:
    """The checkpoint with config.modulation, which may add it. Raises FlextronError where it would take it away."""
    if config.modulation is False and info.space.modulation:
        raise FlextronError(f"checkpoint={info.path}: has modulation, which its networks need: leave modulation=false out")
    return replace(info, space=replace(info.space, modulation=True)) if config.modulation else info
