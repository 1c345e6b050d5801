"""Checks on the login node before a job is submitted."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from flextron_mcore.checkpoint.hf import open_hf
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.data.blend import open_data
from flextron_mcore.launch.plan import PARALLEL, Job, Plan, is_complete
from flextron_mcore.model import check_layout
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.settings.schema import MISSING


def check_configuration(settings: LaunchSettings, plan: Plan) -> None:
    """Raise FlextronError where the configuration itself is wrong, whatever is on disk."""
    for key in ("account",) if settings.cluster.type == "slurm" else ():
        if not getattr(settings.cluster, key):
            raise FlextronError(f"cluster.{key}: is empty; Slurm accounts are listed by `sacctmgr show assoc user=$USER`")
    if settings.overwrite:
        raise FlextronError(
            "overwrite=true: is not for launch, whose jobs continue what is there; remove the directory of the stage"
        )
    for job in plan.to_run:
        _check_axes(plan, job)
        if job.stage in PARALLEL:
            _check_layout(settings, plan, job)


def _check_axes(plan: Plan, job: Job) -> None:
    """A stage that knows heads and neurons only would find out when its turn comes."""
    elastic = [axis for axis in ("hidden_size", "depth") if len(getattr(plan.space, axis)) > 1]
    sensitivity = "sensitivity" in (job.settings.selectors if job.stage == "compare" else ())
    if elastic and (job.stage in ("router", "sensitivity") or sensitivity):
        what, instead = ("selector sensitivity", "set compare.selectors=") if sensitivity else ("it", "use gumbel")
        raise FlextronError(
            f"{job.stage}: space.{elastic[0]} is elastic, and {what} chooses heads and neurons only: {instead}"
            + ("[router,uniform,matformer]" if sensitivity else "")
        )


def _check_layout(settings: LaunchSettings, plan: Plan, job: Job) -> None:
    options, gpus = job.settings.model, settings.cluster.gpus_per_node
    if gpus and job.devices > gpus:
        raise FlextronError(f"{job.stage}: trainer.devices={job.devices} is more than cluster.gpus_per_node={gpus}")
    model_ranks = (options.tensor_model_parallel_size or 1) * (options.pipeline_model_parallel_size or 1)
    if job.ranks % model_ranks:
        raise FlextronError(
            f"{job.stage}: trainer.num_nodes x trainer.devices = {job.ranks} is not a multiple of "
            f"model.tensor_model_parallel_size x model.pipeline_model_parallel_size = {model_ranks}"
        )
    copies = job.ranks // model_ranks
    if job.trains and options.global_batch_size % (options.micro_batch_size * copies):
        raise FlextronError(
            f"{job.stage}: model.global_batch_size={options.global_batch_size} is not a multiple of model.micro_batch_size="
            f"{options.micro_batch_size} x {copies} data-parallel ranks"
        )
    length = options.seq_length
    if length and length > plan.model.max_position_embeddings:
        raise FlextronError(
            f"{job.stage}: model.seq_length={length} is more than the model's {plan.model.max_position_embeddings} positions"
        )
    try:
        check_layout(plan.model, plan.space, options, job.settings.trainer.precision or "bf16")
    except FlextronError as error:
        raise FlextronError(f"{job.stage}: {error}") from None


def missing(settings: LaunchSettings, plan: Plan) -> list[str]:
    """Lines that name what the jobs need and is not there yet."""
    lines = list(plan.problems)
    checks: list[Any] = [lambda: _check_results(plan.results), lambda: _check_container(settings)]
    if settings.cluster.type == "slurm":
        checks.append(_check_slurm)
    planned = {str(job.out) for job in plan.jobs}
    for job in plan.to_run:
        for key, look in (("data", _look_at_data), ("hf", _look_at_hf), ("checkpoint", _look_at_checkpoint)):
            value = getattr(job.settings, key, None)
            if value and value != MISSING and str(value) not in planned:
                checks.append(lambda value=value, look=look: look(Path(value), plan.model))
    for check in checks:
        try:
            check()
        except FlextronError as error:
            if str(error) not in lines:
                lines.append(str(error))
    return lines


def _check_results(results: Path) -> None:
    """Raise FlextronError unless the results' directory, or its nearest existing parent, can be written to."""
    if "/nemo_run" in str(results):
        raise FlextronError(f"run.results_dir={results}: NeMo-Run takes /nemo_run for its own directory; choose another name")
    folder = results
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    probe = folder / f".flextron-{os.getpid()}"
    try:
        probe.touch()
    except OSError as error:
        raise FlextronError(f"run.results_dir={results}: cannot be written: {folder}: {error.strerror}") from None
    with contextlib.suppress(OSError):
        probe.unlink()


def _check_container(settings: LaunchSettings) -> None:
    if not settings.cluster.use_container:
        return
    image = settings.container
    if not image:
        raise FlextronError("container=: jobs of this cluster run in containers; name an image, or set cluster=slurm for none")
    if is_file_of_image(image) and not Path(image).expanduser().is_file():
        raise FlextronError(
            f"container={image}: no such file; make it with `enroot import` from the image of this project's Dockerfile, or name "
            "an image of a registry"
        )


def is_file_of_image(image: str) -> bool:
    """True if pyxis takes the image's name for a file, and not for an image of a registry."""
    return image.endswith((".sqsh", ".squashfs")) or image.startswith(("/", "./", "../", "~"))


def _check_slurm() -> None:
    if not shutil.which("sbatch"):
        raise FlextronError("sbatch: not found; launch on a login node of the cluster, or with cluster=local")
    try:
        import nemo_run  # noqa: F401
    except ImportError as error:
        raise FlextronError(f"NeMo-Run cannot be imported ({error}): pip install 'flextron_mcore[launch]'") from None


def _look_at_data(path: Path, model: ModelConfig) -> None:
    data = open_data(path)
    if data.vocab_size > model.vocab_size:
        raise FlextronError(f"data={path}: its tokenizer has {data.vocab_size} tokens, the model's vocabulary {model.vocab_size}")


def _look_at_hf(path: Path, model: ModelConfig) -> None:
    _compare(f"hf={path}", open_hf(path).model, model)


def _look_at_checkpoint(path: Path, model: ModelConfig) -> None:
    if path.is_dir() and not is_complete(path):
        raise FlextronError(f"checkpoint={path}: the run there is not complete")
    _compare(f"checkpoint={path}", open_checkpoint(path).model, model)


def _compare(what: str, found: ModelConfig, planned: ModelConfig) -> None:
    for name, value in found.to_dict().items():
        wanted = planned.to_dict()[name]
        if value != wanted and name not in ("init_method_std", "hidden_dropout", "attention_dropout"):
            raise FlextronError(
                f"{what}: is another model than model= says, by which layouts are checked: its {name} is {value}, not {wanted}"
            )
