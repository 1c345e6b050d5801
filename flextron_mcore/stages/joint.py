"""`flextron joint`: joint tuning of routers and model, without the surrogate model (Flextron, section 3.2)."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from flextron_mcore.adaptive.training import train_adaptive
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import open_data
from flextron_mcore.routers.store import kind_of_routers, read_routers
from flextron_mcore.runs.choice import available_costs, check_table, latency_table
from flextron_mcore.runs.opened import check_space
from flextron_mcore.runs.routers import router_training, train_routers
from flextron_mcore.settings.sections import RouterSettings
from flextron_mcore.settings.training import JointSettings
from flextron_mcore.training.checks import check
from flextron_mcore.training.static import StraightThroughLearner
from flextron_mcore.training.teacher import open_teacher


def run(settings: JointSettings) -> dict[str, Any]:
    """Train the model of settings.checkpoint together with its routers, and write a checkpoint with both.

    Call on all ranks. Returns the content of metrics.json, the result of `train_routers` (runs/routers.py), or of
    `train_adaptive` (adaptive/training.py) for adaptive routers.
    """
    info, data = open_checkpoint(settings.checkpoint), open_data(settings.data)
    check_space(settings, info)
    choices = Choices(info.model, info.space)
    if kind_of_routers(info.path) == "adaptive":
        return train_adaptive(settings, info, data)
    described, routers = read_routers(info.path, choices)
    if described.kind == "gumbel":
        raise FlextronError(
            f"checkpoint={info.path}: its router chooses on all axes: continue its training with `flextron gumbel`"
        )
    table = latency_table(settings, info)
    check_table(table)
    available = available_costs(settings, info, table)
    teacher = open_teacher(settings, info, data)
    seq_length = check(settings, info, data, 1 + settings.targets_per_step + (teacher is not None))
    described = replace(described, evaluated=())  # drop losses of candidates: they are of the model before this training
    training = router_training(settings, choices, [available[name] for name in described.costs], described, table)
    router = RouterSettings(two_sided_from=0.0, **asdict(settings.router))
    learner = StraightThroughLearner(training, router, routers)
    return train_routers(settings, info, data, learner, seq_length, frozen=False, teach=settings.distillation, teacher=teacher)
