"""Jobs in one torchrun: starting the processes costs more than what most tests compute.

A job is {"stage": name, "keys": [...]}, run as the command line would, or {"call": "module:function", "arguments": {...}}. The
jobs follow each other in the same processes, each with the layout that it asks for.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def torchrun(processes: int, *arguments: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node processes -m arguments...`, finished; its output is captured."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return subprocess.run(
        [*command, *arguments],
        env={**env, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_jobs(processes: int, jobs: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """Run the jobs in `processes` processes: for each job, for each rank {"result": ...} or {"error": a FlextronError's text}.

    What a job prints is under "printed". folder: an existing directory for the workers' results.
    """
    (folder / "jobs.json").write_text(json.dumps(jobs))
    finished = torchrun(processes, "tests.parallel.worker", str(folder))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    return [list(job) for job in zip(*ranks, strict=True)]


def _run(job: dict[str, Any]) -> Any:
    if "stage" in job:
        from flextron_mcore.cli import compose, run_stage

        return run_stage(compose(job["stage"], job["keys"]))
    module, _, function = job["call"].partition(":")
    return getattr(importlib.import_module(module), function)(**job.get("arguments", {}))


def main(folder: Path) -> None:
    """Run the jobs of `folder`/jobs.json on this rank."""
    import contextlib
    import io

    from flextron_mcore.cli import prepare_environment
    from flextron_mcore.config import FlextronError

    prepare_environment()
    from flextron_mcore.runtime import distributed

    distributed.initialize()
    from megatron.core import parallel_state

    done = []
    for job in json.loads((folder / "jobs.json").read_text()):
        parallel_state.destroy_model_parallel()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                outcome = {"result": _run(job)}
            except FlextronError as error:
                outcome = {"error": str(error)}
        done.append({**outcome, "printed": printed.getvalue()})
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(done))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
