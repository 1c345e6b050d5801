"""Start `flextron` on several ranks, find all its processes, and see how they end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flextron_mcore.runtime.watch import LAUNCH

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Job:
    """Processes of one training run. A mark in the environment identifies them and their helper processes."""

    out: Path
    processes: list[subprocess.Popen]
    mark: str
    started: float = field(default_factory=time.monotonic)

    def finish(self) -> tuple[list[int], list[str]]:
        """Wait for the processes, and return (exit code of each, lines that they printed)."""
        output = [process.communicate(timeout=240)[0] for process in self.processes]
        return [process.returncode for process in self.processes], "".join(output).splitlines()

    def kill(self) -> None:
        """Kill the processes of the job that are left."""
        for pid in marked(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def left_behind(self, seconds: float = 10) -> list[str]:
        """Ids of the job's processes that are still there after so many seconds."""
        deadline = time.monotonic() + seconds
        while (found := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


def marked(mark: str) -> list[str]:
    """Ids of the processes whose environment contains the mark."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # the process ended meanwhile
            if mark.encode() in environment.read_bytes():
                found.append(environment.parent.name)
    return found


def start(argv: Sequence[str], out: Path, ranks: int, fault: str = "", torchrun: bool = False, patience: str = "") -> Job:
    """Start `flextron` on several ranks, with srun's environment or by torchrun.

    Args:
        argv: arguments of the command.
        out: directory of its result.
        ranks: number of processes.
        fault: variable FAULT of tests/parallel/faulty.py; empty: none.
        torchrun: start the ranks by torchrun.
        patience: variable FLEXTRON_RANK_TIMEOUT, seconds after which a silent rank counts as dead; empty: the default.
    """
    mark = f"JOB={uuid.uuid4()}"
    env = {k: v for k, v in os.environ.items() if k not in LAUNCH}
    env |= {"OMP_NUM_THREADS": "1", "FAULT": fault, "JOB": mark.removeprefix("JOB=")}
    env |= {"FLEXTRON_RANK_TIMEOUT": patience}
    module = ["tests.parallel.faulty" if fault else "flextron_mcore", *argv]
    if torchrun:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        places: list[dict[str, str]] = [{}]
    else:
        launcher = [sys.executable, "-m"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        values = [(str(rank), str(ranks), str(rank), "127.0.0.1", port) for rank in range(ranks)]
        places = [dict(zip(LAUNCH, v, strict=True)) for v in values] if ranks > 1 else [{}]
    processes = [
        subprocess.Popen(
            [*launcher, *module],
            env=env | place,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for place in places
    ]
    return Job(out, processes, mark)


def last_of_ours(lines: list[str]) -> str:
    """Last line printed by flextron, not by torchrun."""
    return [line for line in lines if re.match("(flextron|elastic): ", line)][-1]
