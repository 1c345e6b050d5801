"""Jobs in one torchrun: starting the processes costs more than what most tests compute.

A job is {"stage": name, "keys": [...]}, run as the command line would, or {"call": "module:function", "arguments": {...}}. The
jobs follow each other in the same processes, each with the layout that it asks for; those with the same "layout" share groups.
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
# Process groups that are destroyed leave gloo's threads behind, which wake a hundred times a second: after a few layouts new
# processes do better.
LAYOUTS = 4


def torchrun(processes: int, *arguments: str, timeout: float = 1500) -> subprocess.CompletedProcess[str]:
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
    found = []
    for number, part in enumerate(_parts(jobs)):
        inner = folder / str(number)
        inner.mkdir()
        (inner / "jobs.json").write_text(json.dumps(part))
        finished = torchrun(processes, "tests.parallel.worker", str(inner))
        assert finished.returncode == 0, finished.stdout + finished.stderr
        ranks = [json.loads((inner / f"rank{rank}.json").read_text()) for rank in range(processes)]
        found += [list(job) for job in zip(*ranks, strict=True)]
    return found


def _parts(jobs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What runs in the same processes: jobs of at most LAYOUTS layouts."""
    parts, before, count = [[]], None, 0
    for job in jobs:
        if _changes(before, job):
            if count == LAYOUTS:
                parts.append([])
                count = 0
            count += 1
        before = job
        parts[-1].append(job)
    return parts


def _changes(before: dict[str, Any] | None, job: dict[str, Any]) -> bool:
    """Whether a job wants process groups of its own: those without a "layout" all do."""
    return before is None or before.get("layout") is None or before["layout"] != job.get("layout")


def _run(job: dict[str, Any]) -> Any:
    if "stage" in job:
        from flextron_mcore.runs.start import run_stage
        from flextron_mcore.settings.compose import compose

        return run_stage(compose(job["stage"], job["keys"]))
    module, _, function = job["call"].partition(":")
    return getattr(importlib.import_module(module), function)(**job.get("arguments", {}))


def main(folder: Path) -> None:
    """Run the jobs of `folder`/jobs.json on this rank."""
    import contextlib
    import io

    from flextron_mcore.config import FlextronError
    from flextron_mcore.runtime.environment import prepare_environment

    prepare_environment()
    from flextron_mcore.runtime import distributed

    distributed.initialize()
    from megatron.core import parallel_state

    done, before = [], None
    for job in json.loads((folder / "jobs.json").read_text()):
        if _changes(before, job):
            parallel_state.destroy_model_parallel()
        before = job
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
