"""Jobs of a Slurm cluster: one sbatch script a job, each started after the one before it has succeeded.

NeMo-Run's SlurmExecutor writes the scripts. It quotes the values of #SBATCH lines, and nothing else, so all that it puts into a
command is quoted here. Environment variables are exported here, because NeMo-Run would change their names to capitals. sbatch is
called here, because NeMo-Run's own submission passes paths through a shell unquoted.

A training that runs out of time writes a checkpoint and the file $FLEXTRON_STOPPED; the job's script then queues the job again
(requeue.py), and the training continues.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextron_mcore.config import FlextronError
from flextron_mcore.files import expanded
from flextron_mcore.launch import follow, requeue
from flextron_mcore.launch.check import import_nemo_run, is_file_of_image
from flextron_mcore.launch.plan import WRITTEN_LAST, Job, Plan
from flextron_mcore.launch.texts import mounted, quoted
from flextron_mcore.runtime.disk import write_whole
from flextron_mcore.settings.launch import ClusterSettings, LaunchSettings

if TYPE_CHECKING:
    from nemo_run import SlurmExecutor

SHUTDOWN = 600  # seconds for which torchrun lets its processes write a checkpoint after SIGTERM; its default is 30
# NeMo-Run's script prints every line and command; from here on it would print the values of environment variables.
QUIET = "set +vx"
# The head node may know itself by several addresses, or by a loopback address only: take the first that other nodes can reach.
HEAD = """
if [ "$SLURM_NNODES" -gt 1 ]; then
    head_node_ip=$(srun --nodes=1 --ntasks=1 -w "$head_node" bash -c 'hostname --ip-address; hostname -I' | tr ' ' '\\n' |
        grep -E '^[0-9]+([.][0-9]+){3}$' | grep -v '^127[.]' | head -n 1)
    head_node_ip=${head_node_ip:-$head_node}
fi"""
# A training stops before the job's end. Its processes cannot compute that time from their own start, because the job may have
# pulled an image first; so the script asks Slurm.
STOP_AT = """
plain
end=${{SLURM_JOB_END_TIME:-$(date -d "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" +%s 2>/dev/null)}}
if [ -n "$end" ]; then
    reserve={reserve}
    # An administrator has lowered the limit: without this, each job would train for one step.
    if [ "$reserve" -ge $((end - start)) ]; then reserve=$(((end - start) / 2)); fi
    export FLEXTRON_JOB_END=$end FLEXTRON_STOP_AT=$((end - reserve))
fi
last_moment & watcher=$!"""
# Runs a stage once for each pair of arguments: a file that exists if the result is complete, and the stage's configuration.
ONE_BY_ONE = (
    'stage=$1; shift; while [ $# -gt 0 ]; do [ -e "$1" ] || "$0" -m flextron_mcore "$stage" --config "$2" || exit; shift 2; done'
)
# Runs on each node. The first node hosts the rendezvous; torchrun itself decides by addresses, which a node may not recognise.
TORCHRUN = 'exec "$0" -m torch.distributed.run --rdzv-conf "is_host=$((SLURM_NODEID == 0))" "$@"'


@dataclass(frozen=True)
class Submitted:
    """Job of a plan that Slurm has accepted.

    Attributes:
        name: name of the job in the plan.
        id: Slurm's job id; the exports of a batch share one.
        folder: directory of its script and logs.
    """

    name: str
    id: str
    folder: str


def write_scripts(settings: LaunchSettings, plan: Plan, configs: dict[str, Path]) -> list[Path]:
    """Write the sbatch scripts of the batches that are to run, and make their directories; return the files in the same order.

    Args:
        settings: settings of the launch.
        plan: plan of the launch.
        configs: {job's name: configuration file of its stage}.
    """
    files = []
    for name, script in scripts(settings, plan, configs):
        folder = plan.results / follow.JOBS / name
        (folder / "code").mkdir(parents=True, exist_ok=True)  # working directory of the job
        files.append(folder / f"{name}_sbatch.sh")
        write_whole(files[-1], script)
    return files


def submit(plan: Plan, files: list[Path], record: Callable[[list[Submitted]], None]) -> list[Submitted]:
    """Submit the batches of a plan to Slurm, each to start after the one before it has succeeded; return a record of each job.

    Args:
        plan: plan of the launch.
        files: sbatch script of each batch, from `write_scripts`.
        record: function that is called after each submission with all jobs submitted so far, to write them down.

    Raises:
        FlextronError: sbatch refused a job; the jobs submitted before it are cancelled. The message includes sbatch's own.
    """
    jobs: list[Submitted] = []
    try:
        for batch, file in zip(batches(plan), files, strict=True):
            after = [f"--dependency=afterok:{jobs[-1].id}"] if jobs else []
            number = _sbatch([*after, str(file)])
            jobs += [Submitted(job.name, number, str(file.parent)) for job in batch.jobs]
            record(jobs)
    except BaseException:
        if jobs:  # an incomplete chain must not run
            subprocess.run(["scancel", *dict.fromkeys(job.id for job in jobs)], check=False)
        raise
    return jobs


def _sbatch(arguments: list[str]) -> str:
    """Submit a job with sbatch and return Slurm's id of it. Raises FlextronError with sbatch's message if it refuses.

    Args:
        arguments: options of sbatch, then the script.
    """
    # Variables such as SBATCH_ACCOUNT would win over the script's own lines. If this process runs in a job, the new job would
    # inherit that job's sizes (SLURM_*): srun then refuses its options, or starts a wrong number of processes.
    inherited = ("SBATCH_", "SLURM_") if "SLURM_JOB_ID" in os.environ else ("SBATCH_",)
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    environment = {name: value for name, value in os.environ.items() if name in kept or not name.startswith(inherited)}
    command = ["sbatch", "--requeue", "--parsable", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    number = done.stdout.strip().partition(";")[0]  # ID, or ID;CLUSTER
    if done.returncode or not number.isdecimal():
        lines = (done.stderr or done.stdout).strip().splitlines()
        lines = [line.strip() for line in lines if "sbatch: error" in line] or lines[-1:] or [f"exit code {done.returncode}"]
        raise FlextronError(f"sbatch refused a job: {' '.join(lines)}: correct the key of cluster")
    return number


def scripts(settings: LaunchSettings, plan: Plan, configs: dict[str, Path]) -> list[tuple[str, str]]:
    """(name, sbatch script) of each batch of jobs that is to run, exactly as it is submitted; nothing is written.

    Args:
        settings: settings of the launch.
        plan: plan of the launch.
        configs: {job's name: configuration file of its stage}.
    """
    import_nemo_run()
    from nemo_run.core.execution.slurm import SlurmBatchRequest

    found = []
    for batch in batches(plan):
        request = SlurmBatchRequest(
            launch_cmd=["sbatch", "--requeue", "--parsable"],
            jobs=[batch.name],
            command_groups=[_command(settings, batch, configs)],
            executor=_executor(settings, plan, batch),
            max_retries=0,
            extra_env={},
        )
        found.append((batch.name, request.materialize()))
    return found


@dataclass(frozen=True)
class Batch:
    """Jobs of a plan that run as one job of Slurm: a single job, or all exports in a row, which take minutes each.

    Attributes:
        name: name of the Slurm job.
        jobs: jobs of the plan, in the order of running.
    """

    name: str
    jobs: list[Job]

    @property
    def lead(self) -> Job:
        """First job, renamed to the batch's name. Its cluster keys and time limit are those of the Slurm job."""
        return replace(self.jobs[0], name=self.name)


def batches(plan: Plan) -> list[Batch]:
    """Jobs of a plan that are to run, grouped into jobs of Slurm, in the order of running."""
    found: list[Batch] = []
    for stage, group in itertools.groupby(plan.to_run, lambda job: job.stage):
        jobs = list(group)
        if stage == "export" and len(jobs) > 1:
            found.append(Batch(stage, jobs))
        else:
            found += [Batch(job.name, [job]) for job in jobs]
    return found


def _command(settings: LaunchSettings, batch: Batch, configs: dict[str, Path]) -> list[str]:
    """Command that srun starts once on each node, as a list of words quoted for the shell.

    Args:
        settings: settings of the launch.
        batch: jobs that the command runs.
        configs: {job's name: configuration file of its stage}.
    """
    python = "python" if settings.cluster.use_container else sys.executable
    if len(batch.jobs) > 1:
        pairs = [word for job in batch.jobs for word in (str(job.out / WRITTEN_LAST), str(configs[job.name]))]
        return quoted(["bash", "-c", ONE_BY_ONE, python, batch.lead.stage, *pairs])
    (job,) = batch.jobs
    stage = ["-m", "flextron_mcore", job.stage, "--config", str(configs[job.name])]
    if job.ranks == 1:
        return quoted([python, *stage])
    words = [f"--nnodes={job.nodes}", f"--nproc-per-node={job.devices}", "--tee=3"]
    if job.cluster.numa_binding:
        words.append(f"--numa-binding={job.cluster.numa_binding}")
    if job.nodes == 1:
        return quoted([python, "-m", "torch.distributed.run", "--standalone", *words, *stage])
    meeting = ["--rdzv-backend=c10d", '--rdzv-id="$SLURM_JOB_ID"', f'--rdzv-endpoint="$head_node_ip":{_port(job)}']
    return [*quoted(["bash", "-c", TORCHRUN, python]), *meeting, *quoted([*words, *stage])]


def _executor(settings: LaunchSettings, plan: Plan, batch: Batch) -> SlurmExecutor:
    """NeMo-Run's executor of a batch: #SBATCH lines, options of srun, container, and the shell code before the command."""
    import nemo_run as run

    job = batch.lead
    cluster, folder = job.cluster, plan.results / follow.JOBS / job.name
    variables = _environment(settings, plan, job)
    container: dict[str, Any] = {}
    if cluster.use_container:
        image = str(expanded(settings.container).absolute()) if is_file_of_image(settings.container) else settings.container
        container = {"container_image": shlex.quote(image), "container_mounts": quoted(mounts(settings, plan))}
        container["container_env"] = sorted(variables)  # else variables of the image win
    given = {name: value for name, value in cluster.additional_parameters.items() if value not in (None, False)}
    given = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in given.items()}
    if cluster.nodelist:
        given["nodelist"] = cluster.nodelist
    exports = [f"export {name}={value}" for name, value in variables.items()]
    setup = [
        QUIET,
        requeue.lines(job, plan.results, folder, [each.out / WRITTEN_LAST for each in batch.jobs]),
        HEAD,
        *exports,
        f"{cluster.setup}\n" if cluster.setup else "",
        STOP_AT.format(reserve=job.reserve) if job.trains else "",
    ]
    executor = run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        qos=cluster.qos,
        gres=cluster.gres,
        mem=cluster.mem,
        exclusive=cluster.exclusive or None,
        nodes=job.nodes,
        ntasks_per_node=1,  # torchrun, which starts the ranks
        gpus_per_node=cluster.gpus_per_node,
        time=slurm_time(job.time_limit),
        cpus_per_task=cluster.cpus_per_task,
        srun_args=quoted(_srun_options(cluster)),
        # Without kill_on_invalid_dep, the jobs after a failed one would stay in the queue for ever.
        additional_parameters={**given, "kill_on_invalid_dep": "yes"},
        setup_lines="\n".join(filter(None, setup)),
        # NeMo-Run appends the job's name to this directory and uses it in commands only.
        tunnel=run.LocalTunnel(job_dir=shlex.quote(str(folder.parent))),
        packager=run.Packager(),  # copies nothing: the package is in the image, or where all nodes see it
        **container,
    )
    executor.job_dir = str(folder)
    executor.job_details = _details(f"{cluster.job_name_prefix}{job.name}.{settings.run.name}", folder, job.name)
    return executor


def _srun_options(cluster: ClusterSettings) -> list[str]:
    """Options of srun beside NeMo-Run's own."""
    options = []
    if cluster.cpus_per_task:  # srun does not take it from the job
        options.append(f"--cpus-per-task={cluster.cpus_per_task}")
    if cluster.use_container and cluster.container_writable:
        options.append("--container-writable")
    return options + list(cluster.srun_args)


def _details(job_name: str, folder: Path, name: str) -> Any:
    """NeMo-Run's record of a job's name and log files.

    Args:
        job_name: name of the job in Slurm.
        folder: directory of the logs.
        name: name of the batch, part of the log files' names.
    """
    from nemo_run.core.execution.slurm import SlurmJobDetails

    class Details(SlurmJobDetails):
        @property
        def stdout(self) -> Path:
            return folder / f"sbatch_{name}_%j.out"

        @property
        def srun_stdout(self) -> str:  # type: ignore[override]  # NeMo-Run puts it into a command as it is
            return f"{shlex.quote(str(folder / f'log-{name}_%j_'))}${{SLURM_RESTART_COUNT:-0}}.out"

    return Details(job_name=job_name, folder=str(folder))


def mounts(settings: LaunchSettings, plan: Plan) -> list[str]:
    """Mounts of the jobs' containers, HOST:CONTAINER: the results, the absolute paths that jobs read, and container_mounts."""
    kept: list[Path] = []
    for path in sorted({Path(text) for _, text in mounted(plan)}):
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return [f"{path}:{path}" for path in kept] + list(settings.container_mounts)


def _environment(settings: LaunchSettings, plan: Plan, job: Job) -> dict[str, str]:
    """Environment variables of a job, {name: value quoted for the shell}: those of launch, then the user's env_vars."""
    values = {
        "LOGLEVEL": "WARNING",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN),
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1",
    }
    if not settings.cluster.use_container:
        values["PATH"] = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"  # commands of this environment
    values |= {name: shlex.quote(str(value)) for name, value in settings.env_vars.items() if value is not None}
    if job.trains:
        values["FLEXTRON_STOPPED"] = shlex.quote(str(requeue.stopped(job, plan.results)))
    return values


def _port(job: Job) -> int:
    """Rendezvous port of a job's processes, 20000 to 29999, derived from its directory so that two jobs on one node differ."""
    return 20000 + zlib.crc32(str(job.out).encode()) % 10000


def slurm_time(total: int) -> str:
    """Seconds in sbatch's form: days-hours:minutes:seconds."""
    return f"{total // 86400}-{total // 3600 % 24:02d}:{total // 60 % 60:02d}:{total % 60:02d}"
