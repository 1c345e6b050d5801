"""Checks of a launch on the login node, before a job is submitted.

torch, Megatron-Core and NeMo-Run take seconds to import. Functions that need them import them late, so that errors in the keys
are refused before that.
"""

from __future__ import annotations

import shutil
import tempfile
from math import inf
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.cost import UNITS, parameter_cost, parse_budget, read_budget
from flextron_mcore.files import expanded
from flextron_mcore.launch.activations import networks
from flextron_mcore.launch.plan import PARALLEL, Job, Plan, is_complete
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.settings.schema import MISSING, show
from flextron_mcore.training.boards import check_board_keys, check_boards
from flextron_mcore.training.options import check_length, check_options


def check_configuration(settings: LaunchSettings, plan: Plan) -> None:
    """Raise FlextronError for an error in the keys, without looking at the files that they name."""
    if settings.cluster.type == "slurm" and not settings.cluster.account:
        raise FlextronError(
            "cluster.account: is empty: set it to one of the accounts that `sacctmgr show assoc user=$USER` lists"
        )
    if settings.overwrite:
        raise FlextronError(
            "overwrite=true: is not for launch, whose jobs continue unfinished stages: leave it out; to run a stage anew, remove "
            f"its directory in {plan.results}"
        )
    for job in plan.to_run:
        _check_axes(plan, job)
        _check_budgets(plan, job)
        if job.stage in PARALLEL:
            _check_layout(plan, job)
        if job.trains:
            _check_training(job)


def _check_axes(plan: Plan, job: Job) -> None:
    """Raise FlextronError for a stage that chooses heads and neurons only, when another axis is elastic.

    The stage itself would refuse this too, but only when its job starts.
    """
    elastic = [axis for axis in ("hidden_size", "depth") if len(getattr(plan.space, axis)) > 1]
    if not elastic:
        return
    of_axes = f"{job.stage}: space.{elastic[0]} is elastic, and"
    if job.stage == "router":
        raise FlextronError(f"{of_axes} router chooses heads and neurons only: use gumbel in its place in stages=")
    if job.stage == "sensitivity":
        raise FlextronError(f"{of_axes} sensitivity measures heads and neurons only: leave sensitivity out of stages=")
    if job.stage == "compare" and "sensitivity" in job.settings.selectors:
        raise FlextronError(
            f"{of_axes} selector sensitivity chooses heads and neurons only: set compare.selectors=[router,uniform,matformer]"
        )


def _check_budgets(plan: Plan, job: Job) -> None:
    """Raise FlextronError for a budget that no network of the space meets.

    A budget in parameters is compared with the space. Of any other only the sign and a share's range are checked: without a
    latency table, latencies are not known.
    """
    wanted = [getattr(job.settings, key, None) for key in ("budget", "budgets")]
    for text, number, unit in read_budget([each for each in wanted if each not in (None, MISSING)]):
        if UNITS.get(unit, (unit,))[0] == "parameters":
            parse_budget(text, {"parameters": parameter_cost(plan.model, plan.space)})
        elif not 0 < number <= (inf if unit in UNITS else 1):
            raise FlextronError(
                f"budget={text}: {job.stage} can choose no network for it: give a share of the full model's cost above 0 and at "
                "most 1, such as 0.6, or a cost with a unit, such as 25ms"
            )


def _check_layout(plan: Plan, job: Job) -> None:
    """Raise FlextronError for a job whose sizes do not fit its ranks, a node's GPUs, its batch or the model's positions.

    Args:
        plan: plan of the launch.
        job: job of that plan, of a stage with several ranks.
    """
    options, gpus = job.settings.model, job.cluster.gpus_per_node
    if gpus and job.devices > gpus:
        raise FlextronError(
            f"{job.stage}: trainer.devices={job.devices} is more than cluster.gpus_per_node={gpus}: set "
            f"{job.stage}.trainer.devices to at most {gpus}"
        )
    tensor, pipeline = options.tensor_model_parallel_size or 1, options.pipeline_model_parallel_size or 1
    model_ranks = tensor * pipeline
    if job.ranks % model_ranks:
        raise FlextronError(
            f"{job.stage}: {job.ranks} ranks are not a multiple of model.tensor_model_parallel_size={tensor} x "
            f"model.pipeline_model_parallel_size={pipeline}: set {job.stage}.model.tensor_model_parallel_size so that they are"
        )
    copies = job.ranks // model_ranks
    if job.trains and options.global_batch_size % (options.micro_batch_size * copies):
        raise FlextronError(
            f"{job.stage}: model.global_batch_size={options.global_batch_size} is not a multiple of model.micro_batch_size="
            f"{options.micro_batch_size} x {copies} data-parallel ranks: set {job.stage}.model.global_batch_size to a multiple"
        )
    length = options.seq_length
    try:
        check_length(options, length or plan.model.default_length)
    except FlextronError as error:
        raise FlextronError(f"{job.stage}: {error}") from None
    if length and length > plan.model.max_position_embeddings:
        raise FlextronError(
            f"{job.stage}: model.seq_length={length} is more than the model's {plan.model.max_position_embeddings} positions: "
            f"set {job.stage}.model.seq_length to at most that"
        )


def _check_training(job: Job) -> None:
    """Raise FlextronError for keys of a training that its stage would refuse when its job starts, perhaps days later."""
    options = job.settings.model
    copies = job.ranks // ((options.tensor_model_parallel_size or 1) * (options.pipeline_model_parallel_size or 1))
    teacher = getattr(job.settings, "teacher", None) is not None
    try:
        check_options(options, job.settings.trainer.max_steps, copies, networks(job.settings) + teacher)
        check_board_keys(job.settings.exp_manager)
    except FlextronError as error:
        raise FlextronError(f"{job.stage}: {error}") from None


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
    """Messages of one line each: inputs on disk and tools that the jobs need and that are missing or wrong."""
    lines = list(plan.problems)
    checks: list[Any] = [lambda: _check_results(plan.results), lambda: _check_container(settings)]
    if settings.cluster.type == "slurm":
        checks.append(_check_slurm)
    planned = {str(job.out) for job in plan.jobs}
    for job in plan.to_run:
        if job.trains and not settings.cluster.use_container:  # packages of an image are not seen from here
            checks.append(lambda job=job: _check_loggers(job))
        looks = (("data", _look_at_data), ("hf", _look_at_hf), ("checkpoint", _look_at_checkpoint), ("teacher", _look_at_teacher))
        for key, look in looks:
            value = getattr(job.settings, key, None)
            if isinstance(value, str) and value not in ("", MISSING, *planned):  # `hf` of `export` is a section, not a path
                name = key if key in ("data", "hf") else f"{job.stage}.{key}"  # data and hf are keys of launch, too
                checks.append(lambda name=name, value=value, look=look: look(name, Path(value), plan.model))
    _collect(checks, lines)
    if settings.cluster.type == "slurm" and (settings.dry_run or not lines):  # last: its import takes seconds
        _collect([import_nemo_run], lines)
    return lines


def _collect(checks: list[Any], lines: list[str]) -> None:
    """Append to `lines` the messages of the checks that raise a FlextronError, each once."""
    for check in checks:
        try:
            check()
        except FlextronError as error:
            if str(error) not in lines:
                lines.append(str(error))


def _check_loggers(job: Job) -> None:
    try:
        check_boards(job.settings.exp_manager)
    except FlextronError as error:
        raise FlextronError(f"{job.stage}: {error}") from None


def _check_results(results: Path) -> None:
    """Raise FlextronError unless the directory of results, or its nearest existing parent, is writable; nothing is left there."""
    folder = results
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):  # access rights do not show that a file system is read-only or full
            pass
    except OSError as error:
        raise FlextronError(
            f"run.results_dir={results}: cannot be written: {folder}: {error.strerror}: set base_results_dir= to a directory "
            "that you may write"
        ) from None


def _check_container(settings: LaunchSettings) -> None:
    """Raise FlextronError if jobs run in containers, and no image is named, or its file does not exist."""
    if not settings.cluster.use_container:
        return
    image = settings.container
    if not image:
        raise FlextronError(
            "container=null: jobs of this cluster run in containers: name an image, or use cluster=slurm, which needs none"
        )
    if is_file_of_image(image) and not expanded(image).is_file():
        raise FlextronError(
            f"container={image}: no such file: make it with `enroot import` from the image of this project's Dockerfile, or name "
            "an image in a registry"
        )


def is_file_of_image(image: str) -> bool:
    """True if pyxis, Slurm's container plug-in, reads `image` as a file; False if as the name of an image in a registry."""
    return image.endswith((".sqsh", ".squashfs")) or image.startswith(("/", "./", "../", "~"))


def _check_slurm() -> None:
    """Raise FlextronError unless sbatch is on the PATH and NeMo-Run can be imported."""
    if not shutil.which("sbatch"):
        raise FlextronError("sbatch: not found: launch on a login node of the cluster, or with cluster=local")


def import_nemo_run() -> None:
    """Raise FlextronError unless NeMo-Run can be imported."""
    try:
        import nemo_run  # noqa: F401
    except ImportError as error:
        raise FlextronError(f"NeMo-Run cannot be imported ({error}): pip install 'flextron_mcore[launch]'") from None


def _look_at_data(key: str, path: Path, model: ModelConfig) -> None:
    """Raise FlextronError if prepared data cannot be opened, or have more tokens than the model's vocabulary.

    Args:
        key: key that names the data, for messages.
        path: directory of the data.
        model: architecture of the launch.
    """
    from flextron_mcore.data.blend import open_data

    data = open_data(path)
    if data.vocab_size > model.vocab_size:
        raise FlextronError(
            f"{key}={path}: its tokenizer has {data.vocab_size} tokens, the model's vocabulary {model.vocab_size}: prepare the "
            "text with the model's tokenizer"
        )


def _look_at_hf(key: str, path: Path, model: ModelConfig) -> None:
    """Raise FlextronError if a Hugging Face checkpoint cannot be opened, or is another model than the launch's.

    Args:
        key: key that names the checkpoint, for messages.
        path: directory of the checkpoint.
        model: architecture of the launch.
    """
    from flextron_mcore.checkpoint.hf import open_hf

    _compare(f"{key}={path}", open_hf(path).model, model)


def _look_at_checkpoint(key: str, path: Path, model: ModelConfig) -> None:
    """Raise FlextronError if a checkpoint cannot be opened, is unfinished, or is of another model than the launch's.

    Args:
        key: key that names the checkpoint, for messages.
        path: directory of the stage that wrote it.
        model: architecture of the launch.
    """
    from flextron_mcore.checkpoint.store import open_checkpoint

    if path.is_dir() and not is_complete(path):
        raise FlextronError(
            f"{key}={path}: its stage has not finished (it has no metrics.json): run the stage again to its end, or name "
            "another checkpoint"
        )
    _compare(f"{key}={path}", open_checkpoint(path).model, model)


def _look_at_teacher(key: str, path: Path, model: ModelConfig) -> None:
    """Raise FlextronError if a teacher's checkpoint cannot be opened, or has another vocabulary size than the launch's model.

    Args:
        key: key that names the checkpoint, for messages.
        path: directory of the checkpoint.
        model: architecture of the launch.
    """
    from flextron_mcore.checkpoint.store import open_checkpoint

    found = open_checkpoint(path, key).model.vocab_size
    if found != model.vocab_size:
        raise FlextronError(
            f"{key}={path}: has a vocabulary of {found} tokens, the model one of {model.vocab_size}: choose a teacher with the "
            "model's tokenizer, such as its parent"
        )


def _compare(what: str, found: ModelConfig, planned: ModelConfig) -> None:
    """Raise FlextronError if the architecture of a checkpoint is not the launch's; initialisation and dropout may differ.

    Args:
        what: KEY=PATH of the checkpoint, for messages.
        found: architecture of the checkpoint.
        planned: architecture of the launch.
    """
    for name, value in found.to_dict().items():
        wanted = planned.to_dict()[name]
        if value != wanted and name not in ("init_method_std", "hidden_dropout", "attention_dropout"):
            raise FlextronError(
                f"{what}: is another model than model= says: its {name} is {show(value)}, not {show(wanted)}: choose the recipe "
                f"of this model with model=, or set model.{name}={show(value)}"
            )
