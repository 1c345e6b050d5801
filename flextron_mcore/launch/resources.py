"""Memory, FLOPs and hours of the jobs of a launch: their table, and the refusal of layouts that do not fit into a GPU."""

from __future__ import annotations

import math
import re

from flextron_mcore.config import FlextronError
from flextron_mcore.launch.estimate import Estimate, estimate
from flextron_mcore.launch.plan import TRAINS, Job, Plan, count
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.settings.schema import MISSING

# Memory for the CUDA context, NCCL's buffers and fragmentation: bytes, and a share of the estimate (docs/estimates.md).
RESERVE, RESERVED_SHARE = 2 * 2**30, 0.05


def check_memory(settings: LaunchSettings, plan: Plan) -> None:
    """Raise FlextronError for the first stage that needs more than cluster.gpu.memory; check nothing if that key is not set."""
    size = gpu_memory(settings)
    for job in plan.to_run:
        try:
            found = job_estimate(plan, job)
        except FlextronError as error:  # sizes that do not divide
            raise FlextronError(f"{job.stage}: {error}") from None
        if size is None or found is None or with_reserve(found.memory) <= size:
            continue
        parts = ", ".join(
            f"{name} {value / 1e9:.1f}"
            for name, value in (
                ("weights", found.weights),
                ("gradients", found.gradients),
                ("optimizer", found.optimizer),
                ("activations", found.activations),
            )
        )
        raise FlextronError(
            f"{job.stage}: needs {found.memory / 1e9:.1f} GB of each GPU ({parts}) and {RESERVED_SHARE:.0%} + "
            f"{RESERVE >> 30} GiB in reserve; it has {size / 1e9:.0f} GB (cluster.gpu.memory): "
            + _remedy(job, with_reserve(found.weights) > size)
        )


def with_reserve(memory: int) -> int:
    """Bytes that a GPU must have for a stage whose estimate is `memory` bytes: the estimate, a share of it, and a constant."""
    return math.ceil(memory * (1 + RESERVED_SHARE)) + RESERVE


def _remedy(job: Job, weights: bool) -> str:
    """Advice for a stage that does not fit into its GPUs, with keys that this stage has.

    Args:
        job: job of the stage.
        weights: True if the weights alone do not fit.
    """
    if job.stage == "latency" and weights:
        return "latency runs on one GPU: leave latency out of stages=; routers then count parameters instead"
    if job.stage == "family" and weights:
        return "family runs on one GPU: use export in place of family in stages="
    if job.stage == "latency":
        return "lower latency.setting.batch_size or latency.setting.prompt_length"
    if job.stage == "family":
        return "lower family.model.micro_batch_size"
    return f"use more GPUs, or raise {job.stage}.model.tensor_model_parallel_size"


def gpu_memory(settings: LaunchSettings) -> int | None:
    """Bytes of cluster.gpu.memory; None if it is not set."""
    text = settings.cluster.gpu.memory
    if text is None:
        return None
    number, unit = re.match(r"\s*([\d.]+)\s*(GB|GiB)", text).groups()  # the schema refuses other forms
    return int(float(number) * (10**9 if unit == "GB" else 2**30))


COLUMNS = (
    *("job", "nodes", "ranks", "tokens", "weights", "gradients", "optimizer", "activations", "together"),
    *("FLOPs", "hours", "jobs", "cost"),
)


def resources(settings: LaunchSettings, plan: Plan) -> tuple[str, list[list[str]]]:
    """Table of estimates: (title, rows). A row has the COLUMNS of a job that is to run; `-` where nothing is estimated."""
    gpu, rows = settings.cluster.gpu, []
    gpu_hours = 0.0
    for job in plan.to_run:
        row = [job.name, str(job.nodes), str(job.ranks)]
        found = job_estimate(plan, job)
        if found is None:
            rows.append([*row, *["-"] * (len(COLUMNS) - len(row))])
            continue
        memory = [found.weights, found.gradients, found.optimizer, found.activations, found.memory]
        # An evaluation without limit_val_batches has 0 tokens here: it reads all data, whose size is not known.
        tokens = count(found.tokens) if found.tokens else "all"
        flops = f"{found.flops:.2e}" if found.tokens else "-"
        row += [tokens, *(f"{value / 1e9:.1f}" for value in memory), flops]
        hours = job_hours(settings, plan, job)
        if hours is None:
            rows.append([*row, "-", "-", "-"])
            continue
        taken = hours * job.gpus
        gpu_hours += taken
        jobs = max(1, math.ceil(hours * 3600 / max(1, job.usable)))
        rows.append([*row, f"{hours:.2f}", str(jobs), f"${taken * gpu.price:,.0f}" if gpu.price else "-"])
    title = "estimates; memory in GB of the fullest rank, without the CUDA context"
    if gpu.peak_tflops:
        speed = f"{settings.cluster.utilisation:.0%} of {gpu.peak_tflops:g} TFLOP/s a GPU"
        title += f"; hours at {speed}: {gpu_hours:,.0f} GPU hours"
        title += f", ${gpu_hours * gpu.price:,.0f}" if gpu.price else ""
    return title, rows


def job_hours(settings: LaunchSettings, plan: Plan, job: Job) -> float | None:
    """Estimated hours of a job; None where nothing is estimated.

    Args:
        settings: settings of the launch, with the speed of a GPU.
        plan: plan of the launch.
        job: job of that plan.
    """
    found, peak = job_estimate(plan, job), settings.cluster.gpu.peak_tflops
    if found is None or not peak or not found.tokens:
        return None
    return found.hours(job.ranks, peak * 1e12, settings.cluster.utilisation)


def job_estimate(plan: Plan, job: Job) -> Estimate | None:
    """Estimate of a job; None for a stage that is not estimated.

    That is a stage not in ESTIMATED, `latency` with measurements made elsewhere, and `family` without data or budgets.
    """
    measured_elsewhere = job.stage == "latency" and job.settings.measurements
    unknown = job.stage == "family" and (job.settings.data is None or job.settings.budgets == MISSING)
    if job.stage not in ESTIMATED or measured_elsewhere or unknown:
        return None
    precision = getattr(getattr(job.settings, "trainer", None), "precision", None)
    return estimate(plan.model, plan.space, job.settings, job.ranks, precision or "bf16")


ESTIMATED = (*TRAINS, "importance", "latency", "sensitivity", "evaluate", "compare", "family")  # stages with an estimate
