"""Jobs of a launch on this machine (cluster=local), one after another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flextron_mcore.config import FlextronError, JobFailed
from flextron_mcore.launch.plan import Job
from flextron_mcore.settings.launch import LaunchSettings


def check(jobs: list[Job]) -> None:
    """Raise FlextronError for a job that needs several nodes."""
    for job in jobs:
        if job.nodes > 1:
            raise FlextronError(
                f"{job.stage}: trainer.num_nodes={job.nodes}: cluster=local is one machine: use cluster=slurm, or a value of "
                "gpus= whose layout has num_nodes: 1"
            )


def run(jobs: list[Job], configs: dict[str, Path], environment: dict[str, str]) -> None:
    """Run jobs on this machine, one after another, each as a process of its own.

    Args:
        jobs: jobs to run, in this order.
        configs: {job's name: configuration file of its stage}.
        environment: environment variables that the jobs get on top of this process's.

    Raises:
        JobFailed: a job failed; later ones are not run.
    """
    for job in jobs:
        print(f"== {job.name}", flush=True)
        code = subprocess.run(command(job, configs[job.name]), env={**os.environ, **environment}, check=False).returncode
        if code:
            raise JobFailed(
                f"{job.name}: ended with exit code {code}; the stages after it were not run: correct the error above, then "
                "launch again"
            )


def environment(settings: LaunchSettings) -> dict[str, str]:
    """Environment variables that the user sets for all jobs: settings.env_vars as text, without null values.

    A job has them on top of the variables of this process.
    """
    return {name: str(value) for name, value in settings.env_vars.items() if value is not None}


def command(job: Job, config: Path) -> list[str]:
    """Command line, as a list of words, that runs a job's stage on this machine, under torchrun if it has several ranks."""
    if job.ranks == 1:
        return [sys.executable, "-m", "flextron_mcore", job.stage, "--config", str(config)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.devices}"]
    return [*launcher, "-m", "flextron_mcore", job.stage, "--config", str(config)]
