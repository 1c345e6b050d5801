"""`flextron joint`: routers and model tuned together, the surrogate dropped (Flextron, section 3.2, last paragraph)."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from flextron_mcore.adaptive.training import train_adaptive
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import open_data
from flextron_mcore.routers.store import kind_of_routers, read_routers
from flextron_mcore.runs.choice import check_table, known_costs, latency_table
from flextron_mcore.runs.opened import check_space
from flextron_mcore.runs.routers import train_routers
from flextron_mcore.settings.sections import RouterSettings
from flextron_mcore.settings.training import JointSettings
from flextron_mcore.training.checks import check
from flextron_mcore.training.router import RouterTraining
from flextron_mcore.training.static import StraightThroughLearner


def run(config: JointSettings) -> dict[str, Any]:
    """Tune the model of config.checkpoint and its routers."""
    info, data = open_checkpoint(config.checkpoint), open_data(config.data)
    check_space(config, info)
    blocks = Choices(info.model, info.space)
    if kind_of_routers(info.path) == "adaptive":
        return train_adaptive(config, info, data)
    described, routers = read_routers(info.path, blocks)
    if described.kind == "gumbel":
        raise FlextronError(f"checkpoint={info.path}: its router chooses on all axes: train it on with `flextron gumbel`")
    table = latency_table(config, info)
    check_table(table)
    known = known_costs(config, info, table)
    seq_length = check(config, info, data, 1 + config.targets_per_step)
    training = RouterTraining(
        blocks,
        [known[name] for name in described.costs],
        replace(described, evaluated=()),  # was another model's
        config.targets_per_step,
        config.seed,
        config.trainer.max_steps,
        table.to_dict() if table else None,
    )
    settings = RouterSettings(two_sided_from=0.0, **asdict(config.router))
    learner = StraightThroughLearner(training, settings, routers)
    return train_routers(config, info, data, learner, seq_length, frozen=False)
