"""Schema of `flextron launch`. No torch import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from flextron_mcore.settings.schema import MISSING, path, section, setting
from flextron_mcore.settings.sections import ArchitectureSettings
from flextron_mcore.settings.training import StageSettings

# Pattern of names that need no quoting in Slurm, the shell and the file system.
NAME = "[A-Za-z0-9._-]+"


@dataclass
class RunSettings:
    """Section `run`: name, result directory, time limits and retries of a launch; `STAGE.run.KEY` sets a key for one stage."""

    name: str = setting(
        MISSING,
        "name of this launch, in the names of its jobs, and of its directory of results",
        unit="letters, digits and any of . _ -",
        form=f"(?!\\.+$){NAME}",
    )
    results_dir: str = path(
        "${base_results_dir}/${run.name}", "directory of results; every stage writes run.results_dir/STAGE", role="output"
    )
    time_limit: str = setting(
        "1-00:00:00",
        "Slurm time limit of a job; a training that needs longer continues in further jobs",
        unit="days-hours:minutes:seconds",
    )
    stop_before: str = setting(
        "00:20:00",
        "time before the job's end at which training writes a checkpoint and stops, to be queued again; earlier where its "
        "slowest step and save take longer",
        unit="hours:minutes:seconds",
    )
    retries: int = setting(
        3,
        "times that a failed job is queued again without a new checkpoint in between; refused input is not tried again",
        at_least=0,
    )


@dataclass
class GpuSettings:
    """Section `cluster.gpu`: memory, speed and price of one GPU, for the estimates (recipes: conf/gpu)."""

    memory: str | None = setting(
        None,
        "memory of one GPU, which layouts must fit into; null: not checked",
        unit="80GB or 80GiB",
        form=r"\s*\d+(\.\d+)?\s*(GB|GiB)\s*",
    )
    peak_tflops: float | None = setting(
        None, "peak bf16 throughput of one GPU, for the estimate of hours; null: no estimate", unit="TFLOP/s", above=0
    )
    node_bandwidth: float = setting(
        300.0, "speed at which a GPU sends to another one of its node, for the search of a layout", unit="GB/s", above=0
    )
    network_bandwidth: float = setting(
        25.0, "speed at which a GPU sends to another node, for the search of a layout", unit="GB/s", above=0
    )
    price: float | None = setting(
        None, "price of one GPU, for the estimate of costs; null: no estimate", unit="dollars an hour", above=0
    )


@dataclass
class ClusterSettings:
    """Section `cluster`: machine or cluster for jobs (recipes: conf/cluster). `STAGE.cluster.KEY` sets a key for one stage."""

    type: str = setting("slurm", "slurm: submit jobs to a Slurm cluster; local: run them here", choices=("slurm", "local"))
    use_container: bool = setting(False, "run jobs in containers (needs pyxis and enroot on the cluster)")
    account: str | None = setting(
        None,
        "Slurm account (sbatch --account); required for cluster.type=slurm",
        unit="letters, digits and any of . _ -",
        form=f"({NAME})?",
    )
    partition: str | None = setting(
        None,
        "Slurm partition (sbatch --partition), or several; null: the cluster's default",
        unit="letters, digits and any of . _ -, with commas between several",
        form=f"{NAME}(,{NAME})*",
    )
    qos: str | None = setting(
        None,
        "quality of service (sbatch --qos); null: the cluster's default",
        unit="letters, digits and any of . _ -",
        form=NAME,
    )
    exclusive: bool = setting(True, "ask for whole nodes (sbatch --exclusive)")
    gpus_per_node: int | None = setting(
        None,
        "GPUs of a node to ask for (sbatch --gpus-per-node); null: do not ask, for clusters that do not count GPUs",
        at_least=1,
    )
    cpus_per_task: int | None = setting(
        None, "CPUs of a node to ask for (sbatch and srun --cpus-per-task); null: the cluster's default", at_least=1
    )
    numa_binding: str | None = setting(
        None,
        "NUMA binding of ranks to the CPUs near their GPUs (torchrun --numa-binding, PyTorch 2.9 and later); null: none",
        choices=("node", "socket", "exclusive", "core-complex"),
    )
    mem: str | None = setting(
        None,
        "memory of a node to ask for (sbatch --mem); 0: all; null: the cluster's default",
        unit="64G or 0",
        form=r"\d+[KMGTkmgt]?B?",
    )
    gres: str | None = setting(
        None,
        "generic resources (sbatch --gres), such as gpu:8; null: none",
        unit="NAME:TYPE:COUNT, with commas between several",
        form=r"[A-Za-z0-9._:,=()/-]+",
    )
    nodelist: str | None = setting(
        None,
        "nodes to use (sbatch --nodelist), such as node[01-04]; null: any",
        unit="node01,node02 or node[01-04]",
        form=r"[A-Za-z0-9._,\[\]-]+",
    )
    job_name_prefix: str = setting(
        "", "prefix of the jobs' names in Slurm, STAGE.run.name", unit="letters, digits and any of . _ -", form=f"({NAME})?"
    )
    container_writable: bool = setting(False, "let jobs write into the container's root (pyxis' --container-writable)")
    srun_args: list[str] = setting([], "more options of srun, such as [--mpi=pmix]")
    setup: str | None = setting(None, 'shell lines of the batch script before the command, such as "module load ..."; null: none')
    additional_parameters: dict[str, Any] = setting({}, "more options of sbatch, {option: value}, such as {reservation: NAME}")
    gpu: GpuSettings = section(GpuSettings)
    utilisation: float = setting(
        0.4, "share of cluster.gpu.peak_tflops that training reaches, for the estimate of hours", above=0, at_most=1
    )


# Keys of `run` and `cluster` that cannot be set for one stage.
OF_ALL_STAGES = (
    *("name", "results_dir", "type", "use_container", "utilisation"),
    *("gpu.memory", "gpu.peak_tflops", "gpu.node_bandwidth", "gpu.network_bandwidth", "gpu.price"),
)


@dataclass
class LaunchSettings(StageSettings):
    """Run several stages, one after another, as jobs of a Slurm cluster or on this machine."""

    stage: ClassVar[str] = "launch"
    # Without launch=NAME, the recipe of conf/launch with the name of the recipe in conf/model is used.
    recipes: ClassVar[dict[str, str | None]] = {
        "cluster": "bcm",
        "gpu": None,
        "model": "llama2/7b",
        "launch": "${model}",
        "recipe": None,
    }

    out: str | None = path(None, "not used: results are in run.results_dir", role="output")
    stages: list[str] = setting(
        ["import", "importance", "elastic", "latency", "router", "joint", "export"], "stages to run, in this order"
    )
    run: RunSettings = section(RunSettings)
    base_results_dir: str = path("results", "directory that holds run.results_dir", role="output")
    data_dir: str = path("data", "directory of inputs, for the defaults of data and of hf in recipes")
    hf: str | None = path(None, "Hugging Face checkpoint that stage import converts")
    data: str = path(
        "${data_dir}/prepared", "directory that `flextron prepare` wrote; with prepare among stages, that job's result instead"
    )
    budgets: list[Any] | None = setting(
        [0.4, 0.6, 0.8],
        "budgets: stage export becomes one job each, stage family takes them all; null: one export, as export.* keys say",
    )
    gpus: int = setting(MISSING, "GPUs of the parallel stages (all that train or evaluate)", at_least=1)
    layouts: dict[int, Any] = setting(
        {},
        "keys of the parallel stages for a number of gpus, {gpus: {trainer: {...}, model: {...}}}; without an entry a layout is "
        "searched",
    )
    container: str | None = path(
        "containers/flextron_mcore.sqsh", "container image, a .sqsh file or a name in a registry, with cluster.use_container=true"
    )
    container_mounts: list[str] = path(
        [], "more mounts of the container, HOST:CONTAINER; results, data and checkpoints are mounted without this"
    )
    env_vars: dict[str, str | None] = setting({}, "environment variables of the jobs, {NAME: value}")
    dry_run: bool = setting(False, "true: print scripts and estimates, submit nothing")
    detach: bool = setting(
        True, "false: wait until all jobs have ended, and exit with code 1 unless all succeeded; true: return after submission"
    )
    cluster: ClusterSettings = section(ClusterSettings)
    model: ArchitectureSettings = section(ArchitectureSettings)
    # {STAGE or "training": {key: value}}: keys typed as STAGE.key=value or training.key=value, already checked by that schema.
    stage_keys: dict[str, Any] = field(default_factory=dict, init=True, metadata={"hidden": True})
