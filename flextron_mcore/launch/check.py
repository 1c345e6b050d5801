"""Checks of a launch on the login node, before a job is submitted.

torch, Megatron-Core and NeMo-Run are imported where they are needed: they take seconds, which a refusal before that does without.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.launch.plan import PARALLEL, Job, Plan, is_complete
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.settings.schema import MISSING, show


def check_configuration(settings: LaunchSettings, plan: Plan) -> None:
    """Raise FlextronError for an error in the keys, without looking at the files that they name."""
    if settings.cluster.type == "slurm" and not settings.cluster.account:
        raise FlextronError(
            "cluster.account: is empty: set it to one of the accounts that `sacctmgr show assoc user=$USER` lists"
        )
    if settings.overwrite:
        raise FlextronError(
            "overwrite=true: is not for launch, whose jobs continue unfinished stages; to run a stage anew, remove its directory "
            f"in {plan.results}"
        )
    for job in plan.to_run:
        _check_axes(plan, job)
        if job.stage in PARALLEL:
            _check_layout(settings, plan, job)


def _check_axes(plan: Plan, job: Job) -> None:
    """Raise FlextronError for a stage that chooses heads and neurons only, when another axis is elastic.

    The stage itself would refuse this too, but only when its job starts.
    """
    elastic = [axis for axis in ("hidden_size", "depth") if len(getattr(plan.space, axis)) > 1]
    if not elastic:
        return
    of_axes = f"{job.stage}: space.{elastic[0]} is elastic, and"
    if job.stage == "router":
        raise FlextronError(f"{of_axes} it chooses heads and neurons only: use gumbel in its place in stages=")
    if job.stage == "sensitivity":
        raise FlextronError(f"{of_axes} it measures heads and neurons only: leave it out of stages=")
    if job.stage == "compare" and "sensitivity" in job.settings.selectors:
        raise FlextronError(
            f"{of_axes} selector sensitivity chooses heads and neurons only: set compare.selectors=[router,uniform,matformer]"
        )


def _check_layout(settings: LaunchSettings, plan: Plan, job: Job) -> None:
    options, gpus = job.settings.model, job.cluster.gpus_per_node
    if gpus and job.devices > gpus:
        raise FlextronError(
            f"{job.stage}: trainer.devices={job.devices} is more than cluster.gpus_per_node={gpus}: set "
            f"{job.stage}.trainer.devices to at most {gpus}"
        )
    model_ranks = (options.tensor_model_parallel_size or 1) * (options.pipeline_model_parallel_size or 1)
    if job.ranks % model_ranks:
        raise FlextronError(
            f"{job.stage}: trainer.num_nodes x trainer.devices = {job.ranks} is not a multiple of "
            f"model.tensor_model_parallel_size x model.pipeline_model_parallel_size = {model_ranks}: set {job.stage}.model.* "
            "sizes that divide it"
        )
    copies = job.ranks // model_ranks
    if job.trains and options.global_batch_size % (options.micro_batch_size * copies):
        raise FlextronError(
            f"{job.stage}: model.global_batch_size={options.global_batch_size} is not a multiple of model.micro_batch_size="
            f"{options.micro_batch_size} x {copies} data-parallel ranks: set {job.stage}.model.global_batch_size to a multiple"
        )
    length = options.seq_length
    if length and length > plan.model.max_position_embeddings:
        raise FlextronError(
            f"{job.stage}: model.seq_length={length} is more than the model's {plan.model.max_position_embeddings} positions: "
            f"set {job.stage}.model.seq_length to at most that"
        )


def check_layouts(plan: Plan) -> None:
    """Raise FlextronError for a stage whose layout Megatron-Core refuses."""
    from flextron_mcore.runtime import cpu

    cpu.enable()  # before Megatron-Core is imported
    from flextron_mcore.model import check_layout

    for job in plan.to_run:
        if job.stage in PARALLEL:
            try:
                check_layout(plan.model, plan.space, job.settings.model, job.settings.trainer.precision or "bf16")
            except FlextronError as error:
                raise FlextronError(f"{job.stage}: {error}") from None


def missing(settings: LaunchSettings, plan: Plan) -> list[str]:
    """Messages, a line each, about the inputs on disk and the tools that the jobs need and that are missing or wrong."""
    lines = list(plan.problems)
    checks: list[Any] = [lambda: _check_results(plan.results), lambda: _check_container(settings)]
    if settings.cluster.type == "slurm":
        checks.append(_check_slurm)
    planned = {str(job.out) for job in plan.jobs}
    for job in plan.to_run:
        looks = (("data", _look_at_data), ("hf", _look_at_hf), ("checkpoint", _look_at_checkpoint), ("teacher", _look_at_teacher))
        for key, look in looks:
            value = getattr(job.settings, key, None)
            if isinstance(value, str) and value not in ("", MISSING, *planned):  # `hf` of an export is a section
                name = key if key in ("data", "hf") else f"{job.stage}.{key}"  # data and hf are keys of launch, too
                checks.append(lambda name=name, value=value, look=look: look(name, Path(value), plan.model))
    for check in checks:
        try:
            check()
        except FlextronError as error:
            if str(error) not in lines:
                lines.append(str(error))
    return lines


def _check_results(results: Path) -> None:
    """Raise FlextronError unless the directory of results, or its nearest existing parent, is writable; nothing is left there."""
    folder = results
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):  # access rights alone would not tell of read-only and full file systems
            pass
    except OSError as error:
        raise FlextronError(
            f"run.results_dir={results}: cannot be written: {folder}: {error.strerror}: set base_results_dir="
        ) from None


def _check_container(settings: LaunchSettings) -> None:
    if not settings.cluster.use_container:
        return
    image = settings.container
    if not image:
        raise FlextronError(
            "container=null: jobs of this cluster run in containers: name an image, or use cluster=slurm, which needs none"
        )
    if is_file_of_image(image) and not Path(image).expanduser().is_file():
        raise FlextronError(
            f"container={image}: no such file: make it with `enroot import` from the image of this project's Dockerfile, or name "
            "an image in a registry"
        )


def is_file_of_image(image: str) -> bool:
    """True if pyxis (Slurm's container plug-in) takes `image` for a file, False if for the name of an image in a registry."""
    return image.endswith((".sqsh", ".squashfs")) or image.startswith(("/", "./", "../", "~"))


def _check_slurm() -> None:
    if not shutil.which("sbatch"):
        raise FlextronError("sbatch: not found: launch on a login node of the cluster, or with cluster=local")
    import_nemo_run()


def import_nemo_run() -> None:
    """Raise FlextronError unless NeMo-Run can be imported."""
    try:
        import nemo_run  # noqa: F401
    except ImportError as error:
        raise FlextronError(f"NeMo-Run cannot be imported ({error}): pip install 'flextron_mcore[launch]'") from None


def _look_at_data(key: str, path: Path, model: ModelConfig) -> None:
    from flextron_mcore.data.blend import open_data

    data = open_data(path)
    if data.vocab_size > model.vocab_size:
        raise FlextronError(
            f"{key}={path}: its tokenizer has {data.vocab_size} tokens, the model's vocabulary {model.vocab_size}: prepare the "
            "text with the model's tokenizer"
        )


def _look_at_hf(key: str, path: Path, model: ModelConfig) -> None:
    from flextron_mcore.checkpoint.hf import open_hf

    _compare(f"{key}={path}", open_hf(path).model, model)


def _look_at_checkpoint(key: str, path: Path, model: ModelConfig) -> None:
    from flextron_mcore.checkpoint.store import open_checkpoint

    if path.is_dir() and not is_complete(path):
        raise FlextronError(
            f"{key}={path}: its stage has not finished (it has no metrics.json): run the stage again to its end, or name "
            "another checkpoint"
        )
    _compare(f"{key}={path}", open_checkpoint(path).model, model)


def _look_at_teacher(key: str, path: Path, model: ModelConfig) -> None:
    from flextron_mcore.checkpoint.store import open_checkpoint

    found = open_checkpoint(path, key).model.vocab_size
    if found != model.vocab_size:
        raise FlextronError(
            f"{key}={path}: has a vocabulary of {found} tokens, the model one of {model.vocab_size}: choose a teacher with the "
            "model's tokenizer, such as its parent"
        )


def _compare(what: str, found: ModelConfig, planned: ModelConfig) -> None:
    for name, value in found.to_dict().items():
        wanted = planned.to_dict()[name]
        if value != wanted and name not in ("init_method_std", "hidden_dropout", "attention_dropout"):
            raise FlextronError(
                f"{what}: is another model than model= says: its {name} is {show(value)}, not {show(wanted)}: choose the recipe "
                f"of this model with model=, or set model.{name}={show(value)}"
            )
