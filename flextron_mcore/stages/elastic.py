"""`flextron elastic`: elastic continued training (Flextron, section 3.1, eq. 5)."""

from __future__ import annotations

from collections import Counter
from typing import Any

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.data.blend import open_data
from flextron_mcore.evaluation.family import uniform_family
from flextron_mcore.runs.opened import check_space
from flextron_mcore.runs.output import write_metrics
from flextron_mcore.runs.resume import resumable_output
from flextron_mcore.runs.terminal import print_table, say
from flextron_mcore.settings.training import ElasticSettings
from flextron_mcore.training.checks import check
from flextron_mcore.training.loop import Phase, train
from flextron_mcore.training.sampler import Mixture, draw, mixture, random_family
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
    count, mode = settings.num_subnetworks, settings.mode
    draw(model, space, settings.seed, 0, count, mode)
    of = _mixture(settings, info)
    uniform = uniform_family(model, space)
    phase = Phase(
        networks=lambda step: [None, *draw(model, space, settings.seed, step, count, mode, of=of)],
        validation=lambda step: {
            **uniform,
            **random_family(model, space, settings.seed, step, settings.validation_subnetworks, settings.mode),
        },
        teach=settings.distillation,
        teacher=teacher,
        full_weight=settings.full_weight,
        noted=(lambda step: {"budgets": of.drawn(settings.seed, step, count)}) if of else None,
    )
    with resumable_output(settings, info, data) as out:
        figures = train(settings, out, info, data, phase, seq_length)
        first, last = figures["validation"]["first"], figures["validation"]["last"]
        rows = [[name, first.get(name, "-"), last[name]] for name in uniform]
        print_table("validation loss (nats per token), mean over domains", ["network", "before", "after"], rows)
        if of:
            steps = range(settings.trainer.max_steps)
            drawn = Counter(budget for step in steps for budget in of.drawn(settings.seed, step, count))
            figures["budgets_drawn"] = {f"{budget:g}": drawn[budget] for budget in of.budgets}
            print_table(
                "random sub-networks drawn, by their share of the parameters",
                ["budget", "probability", "drawn"],
                [[f"{b:g}", p, drawn[b]] for b, p in zip(of.budgets, of.probabilities, strict=True)],
            )
        return write_metrics(out, "elastic", figures)


def _mixture(settings: ElasticSettings, info: CheckpointInfo) -> Mixture | None:
    """Distribution of the random sub-networks of settings.budget_weights, which it prints; None for a uniform draw.

    Raises FlextronError for budgets outside of the space, and if no weight is above 0.
    """
    if settings.budget_weights is None:
        return None
    of = mixture(info.model, info.space, settings.budget_weights)
    shares = [f"{budget:g} of the parameters {p:.1%}" for budget, p in zip(of.budgets, of.probabilities, strict=True)]
    say(f"elastic: draws sub-networks of about {', '.join(shares)}")
    return of
