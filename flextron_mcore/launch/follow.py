"""State of launched jobs, from their results on disk, from Slurm, and from their logs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from flextron_mcore.config import FlextronError
from flextron_mcore.files import explain, open_file, parse_json, read_json
from flextron_mcore.launch.plan import count, is_complete
from flextron_mcore.runtime.disk import write_whole

RECORD = Path("launch") / "jobs.json"
JOBS = Path("launch") / "jobs"  # has a directory with script and logs for each job; in the results, which all nodes see
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING")
ALIVE = (*WAITING, "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
COMPLETE, LOST = "COMPLETE", "ENDED"  # states of ours: the result is on disk; Slurm no longer knows the job


@dataclass(frozen=True)
class Record:
    """Job that `flextron launch` started, as launch/jobs.json stores it.

    Attributes:
        name: name of the job.
        stage: name of the stage that the job runs.
        id: Slurm's job id.
        logs: directory of the job's logs.
        steps: trainer.max_steps; None for a stage that does not train.
        tokens: tokens of one training step, a mean; None for a stage that does not train.
        ranks: processes of the job.
        samples: samples of the whole training; None where they are not known.
    """

    name: str
    stage: str
    id: str
    logs: str
    steps: int | None
    tokens: float | None = None
    ranks: int = 1
    samples: int | None = None


@dataclass(frozen=True)
class Account:
    """Row of a job in Slurm's accounting (sacct); fields are empty texts if there is no row.

    Attributes:
        state: Slurm's name of the job's state.
        elapsed: time since the job's last start, days-hours:minutes:seconds.
        exit: exit code and signal, CODE:SIGNAL.
        reason: Slurm's reason for the state.
        nodes: nodes of the job's last start.
        restarts: number of times that Slurm queued the job again.
    """

    state: str = ""
    elapsed: str = ""
    exit: str = ""
    reason: str = ""
    nodes: str = ""
    restarts: int = 0


@dataclass(frozen=True)
class State:
    """State of a launched job, as `flextron status` shows it.

    Attributes:
        record: the job, as launch/jobs.json stores it.
        state: COMPLETE if the job's result is on disk, else Slurm's name of the state, or ENDED if Slurm no longer knows the job.
        progress: step, loss, tokens and time left of a training; empty for other stages.
        error: log line that says why the stage failed; empty if it did not.
        account: row of the job in Slurm's accounting.
    """

    record: Record
    state: str
    progress: str
    error: str
    account: Account

    @property
    def alive(self) -> bool:
        """True while the job waits or runs."""
        return self.state in ALIVE


STATE_COLUMNS = ("job", "id", "state", "elapsed", "restarts", "nodes", "")


def state_rows(found: Sequence[State]) -> list[list[str]]:
    """Rows of a table with STATE_COLUMNS, one for each job."""
    rows = []
    for state in found:
        account, said = state.account, [state.progress, state.error]
        if state.state not in (COMPLETE, *ALIVE) and account.exit not in ("", "0:0"):
            said.append(f"exit code {account.exit}")
        if account.reason != "None" and state.state in (*WAITING, "CANCELLED"):  # else it is why the job waited
            said.append(account.reason)
        about = [account.elapsed, str(account.restarts) if account.elapsed else "", account.nodes]
        rows.append([state.record.name, state.record.id, state.state.lower(), *about, "; ".join(filter(None, said))])
    return rows


def write_record(results: Path, records: Sequence[Record]) -> None:
    """Write launch/jobs.json into `results` (run.results_dir), in place of an earlier launch's file."""
    content = {"jobs": [asdict(record) for record in records]}
    write_whole(results / RECORD, json.dumps(content, indent=1) + "\n")


def read_record(results: Path) -> list[Record]:
    """Jobs of the newest launch into `results`. Raises FlextronError if there was none, or its record cannot be read."""
    try:
        content = read_json(results / RECORD)
        return [Record(**job) for job in content["jobs"]]
    except FileNotFoundError:
        raise FlextronError(
            f"{results / RECORD}: no such file: nothing was launched to Slurm with run.results_dir={results}: set run= to that "
            "of your launch"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlextronError(f"{results / RECORD}: cannot be read ({explain(error)}): launch again") from None


def states(results: Path, records: Sequence[Record]) -> list[State]:
    """Current state of each job. Raises FlextronError if Slurm does not answer."""
    ids = [record.id for record in records]
    queue, accounts = slurm_states(ids), accounting(ids)
    found = []
    for record in records:
        account = accounts.get(record.id, Account())
        out, state = results / record.name, queue.get(record.id) or account.state or LOST
        if is_complete(out) and state not in ALIVE:
            state = COMPLETE
        error = "" if state == COMPLETE else last_error(record)
        found.append(State(record, state, _progress(out, record), error, account))
    return found


def slurm_states(ids: Sequence[str]) -> dict[str, str]:
    """{job id: Slurm's name of its state} of jobs that Slurm still knows. Raises FlextronError if squeue does not answer."""
    found = dict(line.split() for line in _squeue("--states=all", "--format=%i %T") if len(line.split()) == 2)
    return {name: state for name, state in found.items() if name in ids}


def accounting(ids: Sequence[str]) -> dict[str, Account]:
    """{job id: newest row of the job} in Slurm's accounting; empty where the cluster has none, or it does not answer."""
    if not shutil.which("sacct"):
        return {}
    # JobIDRaw has no steps with --allocations; --duplicates adds a row for each time that a job was queued again.
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", f"--jobs={','.join(ids)}"]
    command += ["--format=JobIDRaw,State,Elapsed,ExitCode,NodeList,Reason"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return {}
    found: dict[str, Account] = {}
    for line in answer.stdout.splitlines() if answer.returncode == 0 else ():
        name, *values = line.split("|", 5)
        if len(values) == 5 and name in ids:
            state, elapsed, code, nodes, reason = values
            restarts = found[name].restarts + 1 if name in found else 0
            nodes = "" if nodes == "None assigned" else nodes
            found[name] = Account((state.split() or [""])[0], elapsed, code, reason, nodes, restarts)
    return found


def queued(results: Path) -> dict[str, str]:
    """{job id: state} of this user's waiting and running jobs whose scripts lie in `results`, also of jobs not in jobs.json."""
    found = {}
    for line in _squeue("--format=%i|%T|%o"):
        name, _, rest = line.partition("|")
        state, _, script = rest.partition("|")
        if Path(script).resolve().is_relative_to((results / JOBS).resolve()):
            found[name] = state
    return found


def _squeue(*options: str) -> list[str]:
    """Lines of squeue about this user's jobs. Raises FlextronError if it does not answer."""
    if not shutil.which("squeue"):
        raise FlextronError("squeue: not found: run this on a login node of the cluster")
    command = ["squeue", "--noheader", "--me", *options]
    for attempt in range(5):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return answer.stdout.splitlines()
        time.sleep(2 * attempt)
    raise FlextronError(f"squeue: {answer.stderr.strip() or answer.returncode}: try again when Slurm answers")


def follow(results: Path, records: Sequence[Record], say: Callable[[str], None], interval: float = 5.0) -> list[State]:
    """Wait until every job has ended, and report changes of state at once, progress once a minute.

    Args:
        results: run.results_dir.
        records: jobs to follow.
        say: receives a line for each report.
        interval: seconds between two questions to Slurm.

    Returns:
        The final state of each job.
    """
    shown: dict[str, tuple[str, str]] = {}
    since: dict[str, float] = {}
    while True:
        found = states(results, records)
        for state in found:
            name, now = state.record.name, (state.state, state.progress)
            changed = shown.get(name, ("", ""))[0] != state.state
            if changed or (now != shown[name] and time.monotonic() - since[name] > 60):
                say(f"{name:<14} {state.state.lower():<12} {state.progress}".rstrip())
                shown[name], since[name] = now, time.monotonic()
        if not any(state.alive for state in found):
            return states(results, records)
        time.sleep(interval)


def last_error(record: Record) -> str:
    """Last line in which a job's stage says why it failed, from the newest log that has one; empty if none has."""
    pattern = re.compile(r"flextron: (error|failed|stopped).*")
    for file in log_files(record):
        lines = _tail(file)
        said = [match[0] for match in map(pattern.search, lines) if match]
        if said:
            return said[-1]
    return ""


def log_files(record: Record) -> list[Path]:
    """Log files of a job, newest first; logs of the job's processes come before logs of its batch script."""
    folder = Path(record.logs)
    files = [path for path in folder.glob(f"*_{record.id}*.out") if path.is_file()]
    return sorted(files, key=lambda path: (path.name.startswith("log-"), path.stat().st_mtime), reverse=True)


def _tail(file: Path, size: int = 100_000) -> list[str]:
    with open_file(file) as stream:
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - size))
        return stream.read().decode(errors="replace").splitlines()


def _is_step(row: Any) -> bool:
    """True for a row of log.jsonl that has the figures of a training step."""
    numbers = ("step", "loss")
    return isinstance(row, dict) and row.get("event") == "train" and all(isinstance(row.get(n), int | float) for n in numbers)


def _progress(out: Path, record: Record) -> str:
    """Step, loss, tokens, and hours left of a training from its log.jsonl; empty for other stages and before the first step."""
    log = out / "log.jsonl"
    if record.steps is None or not log.is_file():
        return ""
    rows = []
    for line in _tail(log):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if _is_step(row):
            rows.append(row)
    if not rows:
        return ""
    step = rows[-1]["step"]
    said = f"step {step}/{record.steps}  loss {rows[-1]['loss']:.4g}"
    speeds = [row.get("tokens_per_second") for row in rows[-20:]]
    speeds = [speed for speed in speeds if isinstance(speed, int | float) and speed > 0]
    if record.tokens:
        read = rows[-1].get("consumed_samples")
        exact = record.samples and isinstance(read, int | float)
        done = record.steps * read / record.samples if exact else step  # in steps of equal size
        said += f"  {count(round(done * record.tokens))} tokens"
        if speeds and step < record.steps:
            hours = (record.steps - done) * record.tokens / median(speeds) / 3600
            said += f"  {hours:.2f} h and {hours * record.ranks:.2f} rank hours left"
    return said
