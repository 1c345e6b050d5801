"""`flextron router`: routers that choose a network for a budget, trained through a surrogate model (Flextron, section 3.2)."""

from __future__ import annotations

from typing import Any

from flextron_mcore.adaptive.training import train_adaptive
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.data.blend import open_data
from flextron_mcore.runs.choice import check_table, latency_table
from flextron_mcore.runs.opened import check_space, check_widths_only
from flextron_mcore.runs.routers import described_routers, train_routers
from flextron_mcore.settings.training import RouterStageSettings
from flextron_mcore.training.checks import check
from flextron_mcore.training.router import RouterTraining
from flextron_mcore.training.static import StraightThroughLearner, SurrogateLearner


def run(config: RouterStageSettings) -> dict[str, Any]:
    """Train routers on the frozen model of config.checkpoint."""
    info, data = open_checkpoint(config.checkpoint), open_data(config.data)
    check_space(config, info)
    check_widths_only(info, "`flextron router`")
    if config.kind == "adaptive":
        return train_adaptive(config, info, data)
    table = latency_table(config, info)
    check_table(table)
    described, costs = described_routers(config, info, table, config.router.hidden_size)
    seq_length = check(config, info, data, 1 + config.targets_per_step)
    training = RouterTraining(
        Choices(info.model, info.space),
        costs,
        described,
        config.targets_per_step,
        config.seed,
        config.trainer.max_steps,
        table.to_dict() if table else None,
    )
    if config.surrogate.enabled:
        learner = SurrogateLearner(training, config.router, config.surrogate)
    else:
        learner = StraightThroughLearner(training, config.router)
    return train_routers(config, info, data, learner, seq_length, frozen=True)
