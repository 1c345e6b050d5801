"""`flextron elastic`: elastic continued training (Flextron, section 3.1, eq. 5)."""

from __future__ import annotations

from typing import Any

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.data.blend import open_data
from flextron_mcore.evaluation.family import uniform_family
from flextron_mcore.runs.opened import check_space
from flextron_mcore.runs.output import write_metrics
from flextron_mcore.runs.resume import resumable_output
from flextron_mcore.runs.terminal import print_table
from flextron_mcore.settings.training import ElasticSettings
from flextron_mcore.training.checks import check
from flextron_mcore.training.loop import Phase, train
from flextron_mcore.training.sampler import draw, random_family
from flextron_mcore.training.teacher import open_teacher


def run(settings: ElasticSettings) -> dict[str, Any]:
    """Train the full model together with random sub-networks, and write a checkpoint.

    Call on all ranks. Returns the content of metrics.json, the results of `train`.
    """
    info, data = open_checkpoint(settings.checkpoint), open_data(settings.data)
    check_space(settings, info)
    teacher = open_teacher(settings, info, data)
    seq_length = check(settings, info, data, 1 + settings.num_subnetworks + (teacher is not None))
    model, space = info.model, info.space
    draw(model, space, settings.seed, 0, settings.num_subnetworks, settings.mode)
    uniform = uniform_family(model, space)
    phase = Phase(
        networks=lambda step: [None, *draw(model, space, settings.seed, step, settings.num_subnetworks, settings.mode)],
        validation=lambda step: {
            **uniform,
            **random_family(model, space, settings.seed, step, settings.validation_subnetworks, settings.mode),
        },
        teach=settings.distillation,
        teacher=teacher,
        full_weight=settings.full_weight,
    )
    with resumable_output(settings, info, data) as out:
        figures = train(settings, out, info, data, phase, seq_length)
        first, last = figures["validation"]["first"], figures["validation"]["last"]
        rows = [[name, first.get(name, "-"), last[name]] for name in uniform]
        print_table("validation loss (nats per token), mean over domains", ["network", "before", "after"], rows)
        return write_metrics(out, "elastic", figures)
