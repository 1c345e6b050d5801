"""Schema of `flextron launch`. No torch import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from flextron_mcore.settings.schema import MISSING, path, section, setting
from flextron_mcore.settings.sections import ArchitectureSettings
from flextron_mcore.settings.training import StageSettings


@dataclass
class RunSettings:
    """A family of jobs. `STAGE.run.time_limit` is of one stage."""

    name: str = setting(MISSING, "name of this family of jobs")
    results_dir: str = path("${base_results_dir}/${run.name}", "every stage writes run.results_dir/STAGE")
    time_limit: str = setting(
        "1-00:00:00", "time limit of a job; a stage that trains continues in further jobs", unit="days-hours:minutes:seconds"
    )
    stop_before: str = setting(
        "00:20:00", "before the limit, training stops with a checkpoint and its job is queued again", unit="hours:minutes:seconds"
    )


@dataclass
class GpuSettings:
    """One GPU, for the estimates."""

    memory: str | None = setting(
        None, "memory of one GPU; null: not checked", unit="80GB or 80GiB", form=r"\s*\d+(\.\d+)?\s*(GB|GiB)\s*"
    )
    peak_tflops: float | None = setting(None, "peak of one GPU in bf16; null: no hours are estimated", unit="TFLOP/s", above=0)


@dataclass
class ClusterSettings:
    """Where jobs run: a recipe of conf/cluster."""

    type: str = setting("slurm", "kind of place: a cluster, or this machine", choices=("slurm", "local"))
    use_container: bool = setting(False, "run jobs in containers (pyxis and enroot)")
    account: str | None = setting(None, "account that jobs are charged to")
    partition: str | None = setting(None, "partition of the cluster")
    qos: str | None = setting(None, "quality of service")
    exclusive: bool = setting(True, "whole nodes")
    gpus_per_node: int | None = setting(None, "what jobs ask for; null where Slurm does not count GPUs", at_least=1)
    mem: str | None = setting(None, "memory of a node for a job; 0: all")
    gres: str | None = setting(None, "generic resources")
    nodelist: str | None = setting(None, "such as node[01-04]")
    job_name_prefix: str = setting("flextron.", "beginning of jobs' names")
    srun_args: list[str] = setting([], "more options of srun")
    setup: str | None = setting(None, 'lines of the batch script before the command: "module load ..."')
    additional_parameters: dict[str, Any] = setting({}, "more options of sbatch: {reservation: NAME}")
    gpu: GpuSettings = section(GpuSettings)
    utilisation: float = setting(0.4, "share of the peak that training reaches, for the hours", above=0, at_most=1)


@dataclass
class LaunchSettings(StageSettings):
    """Stages as jobs of a Slurm cluster, each after the last; or here."""

    stage: ClassVar[str] = "launch"
    # `launch` is as `model` unless it is given.
    recipes: ClassVar[dict[str, str | None]] = {"cluster": "bcm", "model": "llama2/7b", "launch": "${model}", "recipe": None}

    out: str | None = path(None, "not used: results are in run.results_dir")
    stages: list[str] = setting(
        ["import", "importance", "elastic", "latency", "router", "joint", "export"], "stages, in this order"
    )
    run: RunSettings = section(RunSettings)
    base_results_dir: str = path("results", "directory that holds run.results_dir")
    data_dir: str = path("data", "directory that holds data and hf")
    hf: str | None = path(None, "Hugging Face checkpoint that stage import takes")
    data: str = path("${data_dir}/prepared", "directory of `flextron prepare`; prepare's where it is among the stages")
    budgets: list[Any] | None = setting([0.4, 0.6, 0.8], "one export each, and what family has; null: as export.* says")
    gpus: int = setting(MISSING, "GPUs of the stages that run in parallel: one of layouts", at_least=1)
    layouts: dict[int, Any] = setting(MISSING, "{gpus: keys of those stages}")
    container: str | None = path("containers/flextron_mcore.sqsh", "image, or a file of one, for clusters with use_container")
    container_mounts: list[str] = path([], "HOST:CONTAINER; results, data and checkpoint directories are mounted anyway")
    env_vars: dict[str, str | None] = setting({}, "environment variables of the jobs")
    dry_run: bool = setting(False, "print scripts and estimates, submit nothing")
    detach: bool = setting(True, "false: follow until all jobs have ended; exit code 1 unless all succeeded")
    cluster: ClusterSettings = section(ClusterSettings)
    model: ArchitectureSettings = section(ArchitectureSettings)
    # {STAGE or training: its keys}: what was set as STAGE.key=value, checked by the schema of that stage.
    stage_keys: dict[str, Any] = field(default_factory=dict, init=True, metadata={"hidden": True})
