"""Jobs of a Slurm cluster, through NeMo-Run: one sbatch script a job, each started after the one before it succeeded.

A stage that trains ends before its time limit with a checkpoint (trainer.max_time) and leaves the file $FLEXTRON_STOPPED; the
script then queues its own job again, and the stage continues. Slurm queues a job that it preempts again by itself.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextron_mcore.config import FlextronError
from flextron_mcore.launch.check import is_file_of_image
from flextron_mcore.launch.plan import Job, Plan
from flextron_mcore.settings.launch import LaunchSettings

if TYPE_CHECKING:
    from nemo_run import SlurmExecutor

SHUTDOWN = 600  # seconds that torchrun leaves its processes after SIGTERM, to write a checkpoint; its default is 30
REQUEUE = """
requeue_if_stopped() {{
    [ -e "$FLEXTRON_STOPPED" ] || return 0
    rm -f "$FLEXTRON_STOPPED"
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then scontrol requeue "$SLURM_JOB_ID"; fi
}}
rm -f "$FLEXTRON_STOPPED"
trap requeue_if_stopped EXIT
"""


@dataclass(frozen=True)
class Submitted:
    """A job that Slurm has. folder: where its logs are."""

    name: str
    id: str
    folder: str


def submit(settings: LaunchSettings, plan: Plan, configs: dict[str, Path]) -> tuple[str, list[Submitted]]:
    """Submit the jobs; the experiment's id at NeMo-Run, and the jobs. Raises FlextronError with what sbatch said."""
    with _experiment(settings, plan, configs, _home(plan)) as experiment:
        try:
            experiment.run(detach=True)
        except Exception as error:  # NeMo-Run raises what it met: sbatch's complaint is in it
            taken = [job.handle.rsplit("/", 1)[-1] for job in experiment.jobs if job.handle]
            if taken:  # of a chain that is not whole nothing shall run
                subprocess.run(["scancel", *taken], check=False)
            raise FlextronError(f"sbatch refused a job: {_sbatch_error(error)}") from None
        jobs = [Submitted(job.id, job.handle.rsplit("/", 1)[-1], job.executor.job_dir) for job in experiment.jobs if job.handle]
    if len(jobs) != len(plan.to_run):
        raise FlextronError(f"sbatch took {len(jobs)} of {len(plan.to_run)} jobs: see the lines above")
    return experiment._id, jobs


def scripts(settings: LaunchSettings, plan: Plan, configs: dict[str, Path]) -> list[tuple[str, str]]:
    """(name, sbatch script) of each job, exactly as it would be submitted; nothing is written."""
    home = _home(plan)
    with tempfile.TemporaryDirectory() as scratch:
        with _experiment(settings, plan, configs, Path(scratch)) as experiment:
            experiment.dryrun(log=False, delete_exp_dir=False)
            folder = Path(experiment._exp_dir)
            texts = {path.name.removesuffix("_sbatch.sh"): path.read_text() for path in folder.glob("*_sbatch.sh")}
        return [(job.name, texts[job.name].replace(scratch, str(home))) for job in plan.to_run]


def _home(plan: Plan) -> Path:
    """NeMo-Run's directory, which holds scripts and logs: all nodes must see it, so it lies beside the results."""
    return Path(os.environ.get("NEMORUN_HOME") or plan.results / "launch" / "jobs").absolute()


@contextlib.contextmanager
def _experiment(settings: LaunchSettings, plan: Plan, configs: dict[str, Path], home: Path) -> Iterator[Any]:
    given = os.environ.get("NEMORUN_HOME")
    os.environ["NEMORUN_HOME"] = str(home)  # read when NeMo-Run is imported
    try:
        import nemo_run as run
        from nemo_run import config as nemo_config
        from nemo_run.core.frontend.console.api import CONSOLE
    finally:
        os.environ.pop("NEMORUN_HOME") if given is None else os.environ.update(NEMORUN_HOME=given)
    nemo_config.set_nemorun_home(str(home))
    CONSOLE.quiet = True  # it tells how many processes torchrun starts, a line a job
    with run.Experiment(settings.run.name, log_level="WARN", clean_mode=True, skip_status_at_exit=True) as experiment:
        before = None
        for job in plan.to_run:
            arguments = [job.stage, "--config", str(configs[job.name])]
            python = "python" if settings.cluster.use_container else sys.executable
            task = run.Script(path="flextron_mcore", m=True, entrypoint=python, args=arguments)
            before = experiment.add(
                task, executor=_executor(settings, plan, job), name=job.name, dependencies=[before] if before else None
            )
        yield experiment


def _executor(settings: LaunchSettings, plan: Plan, job: Job) -> SlurmExecutor:
    import nemo_run as run

    cluster = settings.cluster
    container: dict[str, Any] = {}
    if cluster.use_container:
        image = (
            str(Path(settings.container).expanduser().absolute()) if is_file_of_image(settings.container) else settings.container
        )
        container = {"container_image": image, "container_mounts": mounts(settings, plan)}
    given = cluster.additional_parameters
    if cluster.nodelist:
        given["nodelist"] = cluster.nodelist
    parallel = job.ranks > 1
    return run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        qos=cluster.qos,
        gres=cluster.gres,
        mem=cluster.mem,
        exclusive=cluster.exclusive or None,
        nodes=job.nodes,
        ntasks_per_node=job.devices,
        gpus_per_node=cluster.gpus_per_node,
        time=slurm_time(job.time_limit),
        job_name_prefix=cluster.job_name_prefix,
        srun_args=list(cluster.srun_args),
        # Without the second, jobs after one that failed would wait for ever.
        additional_parameters={**given, "kill_on_invalid_dep": "yes"},
        setup_lines="\n".join(filter(None, [cluster.setup, REQUEUE.format() if job.trains else None])) or None,
        env_vars=_environment(settings, plan, job),
        launcher=run.Torchrun(rdzv_port=_port(job)) if parallel else None,
        tunnel=run.LocalTunnel(job_dir=""),  # the experiments' directory
        packager=run.Packager(),  # the package is installed: in the image, or where all nodes see it
        poll_estimated_start_time=False,
        **container,
    )


def mounts(settings: LaunchSettings, plan: Plan) -> list[str]:
    """Mounts of the containers, as HOST:CONTAINER: the results, what the jobs read, and container_mounts."""
    paths = [plan.results]
    for job in plan.to_run:
        for key in ("data", "hf", "checkpoint", "latency", "sensitivity", "tokenizer", "input", "subnetwork"):
            value = getattr(job.settings, key, None)
            if isinstance(value, str) and value.startswith("/"):
                paths.append(Path(value))
    kept: list[Path] = []
    for path in sorted(set(paths)):
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return [f"{path}:{path}" for path in kept] + list(settings.container_mounts)


def _environment(settings: LaunchSettings, plan: Plan, job: Job) -> dict[str, str]:
    """The job's environment variables, as NeMo-Run writes them into the script: without quotes of its own."""
    values = {
        "LOGLEVEL": "WARNING",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN),
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1",
    }
    values |= {name: shlex.quote(str(value)) for name, value in settings.env_vars.items() if value is not None}
    if not settings.cluster.use_container:
        values["PATH"] = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"  # where torchrun is
    if job.trains:
        values["FLEXTRON_STOPPED"] = shlex.quote(str(plan.results / "launch" / f"{job.name}.stopped"))
    return values


def _port(job: Job) -> int:
    """Where the job's processes meet: the same for all of them, another for another job of the same machine."""
    return 20000 + zlib.crc32(str(job.out).encode()) % 10000


def slurm_time(total: int) -> str:
    """Seconds as sbatch takes them: days-hours:minutes:seconds."""
    return f"{total // 86400}-{total // 3600 % 24:02d}:{total // 60 % 60:02d}:{total % 60:02d}"


def _sbatch_error(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if "sbatch: error" in line] or str(error).strip().splitlines()[-1:]
    return " ".join(line.strip() for line in lines) or type(error).__name__
