"""Run commands that are killed, or whose disk fails, at the n-th file-system event below a directory."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flextron_mcore.runtime.watch import LAUNCH

ROOT = Path(__file__).resolve().parents[2]
# {error: (calls that fail with it, True if all later ones fail, too)}
ERRORS = {
    errno.ENOSPC: ("open write truncate mkdir link", True),
    errno.EIO: ("write fsync", False),
    errno.EMFILE: ("open", False),
    errno.EACCES: ("open mkdir rename link", True),
}
# Figures in TIMED files that differ from run to run, because clocks and the machine decide them.
MEASURED = rb"step_seconds|tokens_per_second|tflops_per_sec_per_gpu|mfu|memory_gb"
TIMES = re.compile(rb'"(seconds|prompt_ms|ms_per_token|' + MEASURED + rb')": ([0-9.e+-]+|\{[^}]*\})')
TIMED = ("metrics.json", "log.jsonl")  # files with figures of TIMES


class Event(NamedTuple):
    """A file-system event of a command. path: from the watched directory."""

    number: int
    kind: str
    path: str

    @property
    def group(self) -> tuple[str, str]:
        """(kind, path with # for numbers and digests): equal for events of one kind on files that differ in such parts only."""
        return self.kind, re.sub(r"[0-9a-f]{16,}|\d+", "#", self.path)


@dataclass
class Done:
    """A command that ended. code: negative for a signal. errors: lines on standard error, without progress bars."""

    code: int
    output: str
    errors: list[str]
    events: list[Event]


class Harness:
    """Starts commands in children of one process that has imported the package; use as a context."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shim = folder, folder / "shim.so"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O1", "-o", str(self.shim), str(Path(__file__).with_name("shim.c")), "-ldl"], check=True
        )

    def __enter__(self) -> Harness:
        env = {name: value for name, value in os.environ.items() if name not in LAUNCH}
        env |= {"LD_PRELOAD": str(self.shim), "FAULT_STATE": str(self.folder / "state"), "OMP_NUM_THREADS": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            env=env,
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()
        self.server.wait(60)

    def run(self, argv: Sequence[str], root: Path, at: int = 0, error: int = 0) -> Done:
        """Run a command under a fault, to its end.

        Args:
            argv: arguments of `flextron`.
            root: directory below which file-system events count.
            at: number of the event with the fault; 0: none.
            error: errno with which the event's call fails; 0: the command is killed there.
        """
        files = {name: str(self.folder / name) for name in ("stdout", "stderr", "log")}
        (self.folder / "log").unlink(missing_ok=True)
        kinds, lasting = ERRORS.get(error, ("", False))
        job = {"argv": list(argv), "root": str(root), "at": at, "error": error, "kinds": kinds, "lasting": int(lasting), **files}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        log = self.folder / "log"
        events = [line.split(" ", 2) for line in log.read_text().splitlines()] if log.exists() else []
        return Done(
            code,
            (self.folder / "stdout").read_text(errors="replace"),
            [line for line in (self.folder / "stderr").read_text(errors="replace").splitlines() if line and "%|" not in line],
            [Event(int(number), kind, path) for number, kind, path in events],
        )


def contents(folder: Path) -> dict[str, bytes]:
    """{path: content} of all files below a directory, hidden ones too, without figures that clocks decide."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.name == "digests.json":
            files = json.loads(path.read_text())["files"]
            found[str(name)] = repr({file: Path(file).name in TIMED or entry for file, entry in files.items()}).encode()
        else:
            found[str(name)] = TIMES.sub(b"", path.read_bytes()) if path.is_file() else b"directory"
    return found


def empty(folder: Path) -> None:
    """Replace a directory by an empty one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def moments(events: Sequence[Event], count: int, first: int = 0) -> list[Event]:
    """Choose at most `count` events that cover many groups: the first event of each group, then the last, then others.

    first: number of the group to begin with, so that commands with the same groups try different ones.
    """
    groups: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        groups.setdefault(event.group, []).append(event)
    rounds = [[group[0] for group in groups.values()], [group[-1] for group in groups.values()], list(events)]
    ordered: list[Event] = []
    for each in rounds:
        turn = first % len(each) if each else 0
        stride = max(1, len(each) // max(1, count))
        spread = [each[(turn + i) % len(each)] for start in range(stride) for i in range(start, len(each), stride)]
        ordered += [event for event in spread if event not in ordered]
        if len(ordered) >= count:
            break
    return sorted(ordered[:count])
