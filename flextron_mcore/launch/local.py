"""Jobs on this machine, one after another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flextron_mcore.config import FlextronError, JobFailed
from flextron_mcore.launch.plan import Job


def run(jobs: list[Job], configs: dict[str, Path], environment: dict[str, str]) -> None:
    """Run the jobs until one fails. Raises JobFailed naming it."""
    for job in jobs:
        if job.nodes > 1:
            raise FlextronError(f"{job.stage}: trainer.num_nodes={job.nodes}: cluster=local is one machine")
    for job in jobs:
        print(f"== {job.name}", flush=True)
        code = subprocess.run(command(job, configs[job.name]), env={**os.environ, **environment}, check=False).returncode
        if code:
            raise JobFailed(f"{job.name}: ended with exit code {code}; the stages after it were not run")


def command(job: Job, config: Path) -> list[str]:
    """Command that runs a job's stage on this machine."""
    if job.ranks == 1:
        return [sys.executable, "-m", "flextron_mcore", job.stage, "--config", str(config)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.devices}"]
    return [*launcher, "-m", "flextron_mcore", job.stage, "--config", str(config)]
