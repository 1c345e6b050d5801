"""State of jobs, from the results on disk, from Slurm, and from the logs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError
from flextron_mcore.launch.plan import is_complete
from flextron_mcore.runtime.disk import write_whole

RECORD = Path("launch") / "jobs.json"
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING")
ALIVE = (*WAITING, "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
COMPLETE, LOST = "COMPLETE", "ENDED"


@dataclass(frozen=True)
class Record:
    """One job that was launched. id: Slurm's. logs: the directory of its logs."""

    name: str
    stage: str
    id: str
    logs: str
    steps: int | None  # trainer.max_steps of a stage that trains


@dataclass(frozen=True)
class State:
    """state: COMPLETE, what Slurm calls it, or ENDED where Slurm has forgotten it. progress, error: a line, or empty."""

    record: Record
    state: str
    progress: str
    error: str

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


STATE_COLUMNS = ("job", "id", "state", "")


def state_rows(found: Sequence[State]) -> list[list[str]]:
    """A row of STATE_COLUMNS for each job."""
    return [[state.record.name, state.record.id, state.state.lower(), state.progress or state.error] for state in found]


def write_record(results: Path, experiment: str, records: Sequence[Record]) -> None:
    """Remember the jobs of a launch beside its results; those of earlier ones are replaced."""
    content = {"experiment": experiment, "jobs": [asdict(record) for record in records]}
    write_whole(results / RECORD, json.dumps(content, indent=1) + "\n")


def read_record(results: Path) -> list[Record]:
    """The jobs of the newest launch. Raises FlextronError when there was none."""
    try:
        content = json.loads((results / RECORD).read_text(encoding="utf-8"))
        return [Record(**job) for job in content["jobs"]]
    except FileNotFoundError:
        raise FlextronError(
            f"{results / RECORD}: no such file: nothing was launched to Slurm with run.results_dir={results}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlextronError(f"{results / RECORD}: cannot be read ({type(error).__name__})") from None


def states(results: Path, records: Sequence[Record]) -> list[State]:
    """How the jobs stand now."""
    queue = slurm_states([record.id for record in records])
    found = []
    for record in records:
        out, state = results / record.name, queue.get(record.id, LOST)
        if is_complete(out) and state not in ALIVE:
            state = COMPLETE
        error = "" if state == COMPLETE else last_error(record)
        found.append(State(record, state, _progress(out, record.steps), error))
    return found


def slurm_states(ids: Sequence[str]) -> dict[str, str]:
    """{job: state} by Slurm's own names, of the jobs that slurmctld still knows. Raises FlextronError when it does not answer."""
    if not shutil.which("squeue"):
        raise FlextronError("squeue: not found; ask on a login node of the cluster")
    command = ["squeue", "--noheader", "--states=all", "--me", "--format=%i %T"]
    for attempt in range(5):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            break
        time.sleep(2 * attempt)
    else:
        raise FlextronError(f"squeue: {answer.stderr.strip() or answer.returncode}")
    found = dict(line.split() for line in answer.stdout.splitlines() if len(line.split()) == 2)
    return {name: state for name, state in found.items() if name in ids}


def follow(results: Path, records: Sequence[Record], say: Callable[[str], None], interval: float = 5.0) -> list[State]:
    """Wait until every job has ended, and tell of each change; the last states."""
    shown: dict[str, tuple[str, str]] = {}
    since: dict[str, float] = {}
    while True:
        found = states(results, records)
        for state in found:
            name, now = state.record.name, (state.state, state.progress)
            changed = shown.get(name, ("", ""))[0] != state.state
            # progress at most once a minute, changes of state at once
            if changed or (now != shown[name] and time.monotonic() - since[name] > 60):
                say(f"{name:<14}{state.state.lower():<12}{state.progress}".rstrip())
                shown[name], since[name] = now, time.monotonic()
        if not any(state.alive for state in found):
            return states(results, records)
        time.sleep(interval)


def last_error(record: Record) -> str:
    """The line with which the stage said why it failed, in the newest log that has such a line; else nothing."""
    pattern = re.compile(r"flextron: (error|failed|stopped).*")
    for file in log_files(record):
        lines = _tail(file)
        said = [match[0] for match in map(pattern.search, lines) if match]
        if said:
            return said[-1]
    return ""


def log_files(record: Record) -> list[Path]:
    """The logs of a job, newest first; what its processes printed before what its script did."""
    folder = Path(record.logs)
    files = [path for path in folder.glob(f"*_{record.id}*.out") if path.is_file()]
    return sorted(files, key=lambda path: (path.name.startswith("log-"), path.stat().st_mtime), reverse=True)


def _tail(file: Path, size: int = 100_000) -> list[str]:
    with file.open("rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - size))
        return stream.read().decode(errors="replace").splitlines()


def _progress(out: Path, steps: int | None) -> str:
    """How far a training stage is, by its log."""
    log = out / "log.jsonl"
    if steps is None or not log.is_file():
        return ""
    for line in reversed(_tail(log)):
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if row.get("event") == "train":
            return f"step {row['step']}/{steps}  loss {row['loss']:.4g}"
    return ""
