"""Estimates of a launch beside memory and time: disk, time between checkpoints, cost of a preemption, passes over the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flextron_mcore.config import FlextronError
from flextron_mcore.launch.layout import TRAINED
from flextron_mcore.launch.plan import TRAINS, Job, Plan
from flextron_mcore.launch.resources import job_hours
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.settings.schema import MISSING
from flextron_mcore.space import ADAM_BYTES, DTYPE_BYTES, count_parameters
from flextron_mcore.training.rampup import BatchSizes

if TYPE_CHECKING:
    from flextron_mcore.data.blend import PreparedData

COLUMNS = ("job", "checkpoint", "saved every", "kept", "disk")


def storage(settings: LaunchSettings, plan: Plan) -> tuple[str, list[list[str]]]:
    """Table of disk: (title, rows). A row has the COLUMNS of a job that is to run; `-` where nothing large is written.

    A training needs disk for the checkpoints that it keeps and for the one that it is writing. An export counts as the full
    model.
    """
    rows, total = [], 0
    for job in plan.to_run:
        size, number = checkpoint_bytes(plan, job), _kept(job)
        needed = size * (number + job.trains)
        total += needed
        sizes = [f"{value / 1e9:.1f}" if size else "-" for value in (size, needed)]
        saves = _interval(settings, plan, job) if job.trains else "-"
        rows.append([job.name, sizes[0], saves, str(number) if size else "-", sizes[1]])
    return f"checkpoints and exports; GB of disk: {total / 1e9:,.0f}", rows


def checkpoint_bytes(plan: Plan, job: Job) -> int:
    """Bytes of one checkpoint or export of a job; 0 for a stage that writes none, and for `router`, which links the weights."""
    options, stage = job.settings, job.stage
    parameters = count_parameters(plan.model)
    if stage in TRAINED:
        element = DTYPE_BYTES[options.trainer.precision]
        return parameters * (element + ADAM_BYTES[element])
    if stage in ("import", "export", "importance", "family"):
        precision = options.trainer.precision if stage == "importance" else getattr(options, "dtype", None)
        return parameters * DTYPE_BYTES[precision or "bf16"]
    return 0


def _kept(job: Job) -> int:
    """Number of checkpoints or exports of a job that stay on disk."""
    if job.trains:
        return job.settings.exp_manager.checkpoint_callback_params.keep_last
    if job.stage == "family":
        return len(job.settings.budgets) * len(job.settings.formats) if job.settings.budgets != MISSING else 0
    return 1


def _interval(settings: LaunchSettings, plan: Plan, job: Job) -> str:
    """Time from one checkpoint of a training to the next, as text such as "30 min" or "1,000 steps", whichever comes first.

    If the time of a step is not known, the text names both.
    """
    saving, hours = job.settings.exp_manager.checkpoint_callback_params, job_hours(settings, plan, job)
    steps, minutes = f"{saving.every_n_train_steps:,} steps", saving.every_minutes
    if minutes is None:
        return steps
    if hours is None:
        return f"{steps} or {minutes:g} min"
    of_steps = saving.every_n_train_steps * _longest_step(job, hours) * 60
    return f"{minutes:g} min" if minutes < of_steps else steps


def _longest_step(job: Job, hours: float) -> float:
    """Hours of the last step of a training, whose batch is the largest.

    Args:
        job: job of the training.
        hours: hours of the whole training.
    """
    sizes = BatchSizes(job.settings.model, job.settings.trainer.max_steps)
    return hours * sizes.largest / sizes.start(sizes.steps)


def preemptions(settings: LaunchSettings, plan: Plan) -> Iterator[str]:
    """Line for each training on Slurm: how much of its work a preemption loses."""
    for job in plan.to_run:
        if not job.trains or settings.cluster.type != "slurm":
            continue
        hours = job_hours(settings, plan, job)
        step = "" if hours is None else f" ({_longest_step(job, hours) * 3600:.0f} s)"
        size = checkpoint_bytes(plan, job)
        save = f"a checkpoint of {size / 1e9:.1f} GB" if size else "its routers"
        yield (
            f"{job.name}: a preemption costs at most a step{step} where Slurm's GraceTime lasts for one micro-batch and for "
            f"writing {save}, else at most {_interval(settings, plan, job)}"
        )


def repeats(plan: Plan) -> Iterator[str]:
    """Line for each training whose data exist: tokens that it reads, tokens of the data, and how often it reads each domain."""
    from flextron_mcore.data.blend import open_data  # late: imports torch

    opened: dict[str, PreparedData] = {}
    planned = {str(job.out) for job in plan.jobs}
    for job in plan.to_run:
        if job.stage not in TRAINS or job.settings.data in planned:
            continue
        path = job.settings.data
        try:
            if path not in opened:
                opened[path] = open_data(Path(path))
            yield _repeats(job, opened[path], plan)
        except FlextronError:  # `missing` (check.py) says what is wrong with the data
            continue


def _repeats(job: Job, data: PreparedData, plan: Plan) -> str:
    """Line of one training: tokens that it reads, tokens of the data, and how often it reads each domain."""
    from flextron_mcore.data.epochs import reading  # late: imports torch

    options = job.settings.model
    length = options.seq_length or plan.model.default_length
    steps = job.settings.trainer.max_steps
    needed = BatchSizes(options, steps).start(steps) * length
    return f"{job.name}: {reading(data, job.settings.data_weights, needed)}"
