"""Run many jobs in the processes of one torchrun, because starting processes takes longer than most jobs.

A job is {"stage": name, "keys": [...]}, run as by the command, or {"call": "module:function", "arguments": {...}}. Jobs run one
after another in the same processes. Consecutive jobs with the same "layout" share process groups.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Most layouts for the same processes. Destroyed process groups leave threads of gloo behind, which wake a hundred times a second,
# so that new processes are faster.
LAYOUTS = 4


def chosen(layouts: dict[str, Any], short: Collection[str]) -> dict[str, Any]:
    """Layouts to test: those of a short list, which has every kind of parallelism once, or all with FLEXTRON_LAYOUTS=all."""
    assert set(short) <= layouts.keys()
    return layouts if os.environ.get("FLEXTRON_LAYOUTS") == "all" else {name: layouts[name] for name in layouts if name in short}


def torchrun(processes: int, *arguments: str, timeout: float = 1500) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node PROCESSES -m ARGUMENTS...` to its end, with captured output."""
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
    """Run the jobs in `processes` processes. Returns [jobs][ranks] {"result" or "error": text of a FlextronError, "printed"}.

    folder: an existing directory for the workers' files.
    """
    found = []
    for number, part in enumerate(_parts(jobs) if jobs else []):
        inner = folder / str(number)
        inner.mkdir()
        (inner / "jobs.json").write_text(json.dumps(part))
        finished = torchrun(processes, "tests.parallel.worker", str(inner))
        assert finished.returncode == 0, finished.stdout + finished.stderr
        ranks = [json.loads((inner / f"rank{rank}.json").read_text()) for rank in range(processes)]
        found += [list(job) for job in zip(*ranks, strict=True)]
    return found


def _parts(jobs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Jobs split into lists of at most LAYOUTS layouts, each for processes of its own."""
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
    """True if a job needs new process groups: without a "layout", or with another than the job before."""
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
