"""`flextron router`: training of routers, which choose a network for a budget (Flextron, section 3.2, eq. 9-11)."""

from __future__ import annotations

from typing import Any

from flextron_mcore.adaptive.training import train_adaptive
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.data.blend import open_data
from flextron_mcore.runs.choice import check_table, latency_table
from flextron_mcore.runs.opened import check_space, check_widths_only
from flextron_mcore.runs.routers import described_routers, router_training, train_routers
from flextron_mcore.settings.training import RouterStageSettings
from flextron_mcore.training.checks import check
from flextron_mcore.training.static import StraightThroughLearner, SurrogateLearner


def run(settings: RouterStageSettings) -> dict[str, Any]:
    """Train routers beside the frozen model of settings.checkpoint, and write a checkpoint with both.

    Call on all ranks. Returns the content of metrics.json, the result of `train_routers` (runs/routers.py), or of
    `train_adaptive` (adaptive/training.py) for kind=adaptive.
    """
    info, data = open_checkpoint(settings.checkpoint), open_data(settings.data)
    check_space(settings, info)
    check_widths_only(info, "`flextron router`")
    if settings.kind == "adaptive":
        return train_adaptive(settings, info, data)
    table = latency_table(settings, info)
    check_table(table)
    described, costs = described_routers(settings, info, table, settings.router.hidden_size)
    seq_length = check(settings, info, data, 1 + settings.targets_per_step)
    training = router_training(settings, Choices(info.model, info.space), costs, described, table)
    if settings.surrogate.enabled:
        learner = SurrogateLearner(training, settings.router, settings.surrogate)
    else:
        learner = StraightThroughLearner(training, settings.router)
    return train_routers(settings, info, data, learner, seq_length, frozen=True)
