"""State of launched jobs, from their results on disk, from Slurm, and from their logs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from flextron_mcore.config import FlextronError
from flextron_mcore.files import explain, open_file, parse_json, read_json
from flextron_mcore.launch.plan import count, is_complete
from flextron_mcore.runtime.disk import write_whole

RECORD = Path("launch") / "jobs.json"
JOBS = Path("launch") / "jobs"  # in run.results_dir, which all nodes see: a directory for each job, with its script and logs
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING")
ALIVE = (*WAITING, "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
# States of ours: the result is on disk; Slurm no longer knows the job; Slurm does not answer.
COMPLETE, LOST, UNKNOWN = "COMPLETE", "ENDED", "UNKNOWN"
QUESTIONS, WAIT = 5, 20  # how often squeue is asked before it counts as silent, and the longest wait for an answer, seconds
PATIENCE = 3600.0  # seconds for which `follow` waits for a silent Slurm


class SlurmSilent(FlextronError):
    """Slurm's controller does not answer. said: what squeue printed."""

    def __init__(self, said: str) -> None:
        super().__init__(f"squeue: {said}: try again when Slurm answers")
        self.said = said


@dataclass(frozen=True)
class Record:
    """Job that `flextron launch` started, as launch/jobs.json stores it.

    Attributes:
        name: name of the job.
        stage: name of the stage that the job runs.
        id: Slurm's job id.
        logs: directory of the job's logs.
        steps: trainer.max_steps; None for a stage that does not train.
        tokens: tokens of one training step, a mean; None for a stage that does not train, and without model.seq_length.
        ranks: processes of the job.
        samples: samples that all steps of the training read together, for its progress; None for a stage that does not train.
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
    """A job as Slurm's queue (squeue) or its accounting (sacct) shows it; fields are empty texts where it says nothing.

    Attributes:
        state: Slurm's name of the job's state.
        elapsed: time since the job's last start, days-hours:minutes:seconds.
        exit: exit code and signal, CODE:SIGNAL; of the accounting only.
        reason: Slurm's reason for the state.
        nodes: nodes of the job's last start.
        restarts: number of times that Slurm queued the job again; of the accounting only, else None.
    """

    state: str = ""
    elapsed: str = ""
    exit: str = ""
    reason: str = ""
    nodes: str = ""
    restarts: int | None = None


@dataclass(frozen=True)
class State:
    """State of a launched job, as `flextron status` shows it.

    Attributes:
        record: the job, as launch/jobs.json stores it.
        state: COMPLETE if the job's result is on disk, else Slurm's name of the state, or ENDED if Slurm no longer knows the job,
            or UNKNOWN if Slurm does not answer.
        progress: step, loss, tokens and time left of a training; empty for other stages.
        error: log line that says why the stage failed, also an earlier time; empty if it did not.
        account: the job as Slurm shows it.
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


WITHOUT_RESULT = {
    "COMPLETED": "without a result in its directory",
    LOST: "without a result; Slurm no longer knows the job",
    UNKNOWN: "Slurm does not answer",
}
STATE_COLUMNS = ("job", "id", "state", "elapsed", "restarts", "nodes", "")


def state_rows(found: Sequence[State]) -> list[list[str]]:
    """Rows of a table with STATE_COLUMNS, one for each job."""
    rows = []
    for state in found:
        account, error = state.account, state.error
        if error and state.alive:  # the job was queued again since
            error = f"before: {error}"
        said = [state.progress, error]
        if state.state not in (COMPLETE, *ALIVE) and account.exit not in ("", "0:0"):
            said.append(f"exit code {account.exit}")
        if account.reason not in ("None", "NonZeroExitCode") and state.state != COMPLETE:
            said.append(account.reason)
        if state.state in WITHOUT_RESULT:
            said.append(WITHOUT_RESULT[state.state])
        about = [account.elapsed, "" if account.restarts is None else str(account.restarts), account.nodes]
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
        return [_found(Record(**job), results) for job in content["jobs"]]
    except FileNotFoundError:
        raise FlextronError(
            f"{results / RECORD}: no such file: nothing was launched to Slurm with run.results_dir={results}: set run= to the "
            "results directory of your launch"
        ) from None
    except OSError as error:
        raise FlextronError(
            f"{results / RECORD}: cannot be read ({explain(error)}): set run= to a directory of a launch that you may read"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise FlextronError(f"{results / RECORD}: cannot be read ({explain(error)}): launch again") from None


def _found(record: Record, results: Path) -> Record:
    """Record whose `logs` is a directory in `results` if the results were moved after the launch; else the record unchanged."""
    moved = results / JOBS / Path(record.logs).name
    return replace(record, logs=str(moved)) if moved.is_dir() and not Path(record.logs).is_dir() else record


def states(results: Path, records: Sequence[Record]) -> list[State]:
    """Current state of each job. Raises SlurmSilent if Slurm does not answer."""
    ids = [record.id for record in records]
    return _states(results, records, queue(ids), accounting(ids), LOST)


def last_states(results: Path, records: Sequence[Record]) -> list[State]:
    """State of each job without Slurm's queue: from the results, the logs and the accounting, which may be late."""
    return _states(results, records, {}, accounting([record.id for record in records]), UNKNOWN)


def _states(
    results: Path, records: Sequence[Record], shown: dict[str, Account], accounts: dict[str, Account], otherwise: str
) -> list[State]:
    found = []
    for record in records:
        account = accounts.get(record.id, Account())
        if now := shown.get(record.id):  # the accounting may be late: it keeps a hold that was released
            account = replace(now, elapsed=account.elapsed or now.elapsed, exit=account.exit, restarts=account.restarts)
        out, state = results / record.name, account.state or otherwise
        if is_complete(out) and state not in ALIVE:
            state = COMPLETE
        error = "" if state == COMPLETE else last_error(record)
        found.append(State(record, state, _progress(out, record), error, account))
    return found


def queue(ids: Sequence[str]) -> dict[str, Account]:
    """{job id: the job} of jobs that Slurm's queue still shows. Raises SlurmSilent if squeue does not answer."""
    found = {}
    for line in _squeue("--states=all", "--format=%i|%T|%M|%N|%r"):
        name, *values = line.split("|", 4)
        if len(values) == 4 and name in ids:
            state, elapsed, nodes, reason = values
            found[name] = Account(state, elapsed, "", reason, nodes)
    return found


def accounting(ids: Sequence[str]) -> dict[str, Account]:
    """{job id: newest row of the job} in Slurm's accounting; empty where the cluster has none, or it does not answer."""
    if not shutil.which("sacct"):
        return {}
    # JobIDRaw has no steps with --allocations; --duplicates adds a row for each time that a job was queued again.
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", f"--jobs={','.join(ids)}"]
    command += ["--format=JobIDRaw,State,Elapsed,ExitCode,NodeList,Reason"]
    try:
        answer = _answer(command, timeout=60)
    except subprocess.TimeoutExpired:
        return {}
    found: dict[str, Account] = {}
    for line in answer.stdout.splitlines() if answer.returncode == 0 else ():
        name, *values = line.split("|", 5)
        if len(values) == 5 and name in ids:
            state, elapsed, code, nodes, reason = values
            restarts = (found[name].restarts or 0) + 1 if name in found else 0
            nodes, state = "" if nodes == "None assigned" else nodes, (state.split() or [""])[0]
            reason = reason if state in (*WAITING, "CANCELLED") else ""  # else it is why the job waited
            found[name] = Account(state, elapsed, code, reason, nodes, restarts)
    return found


def queued(results: Path) -> dict[str, str]:
    """{job id: state} of this user's waiting and running jobs whose scripts lie in `results`, in jobs.json or not."""
    found = {}
    for line in _squeue("--format=%i|%T|%o"):
        name, _, rest = line.partition("|")
        state, _, script = rest.partition("|")
        if Path(script).resolve().is_relative_to((results / JOBS).resolve()):
            found[name] = state
    return found


def _answer(command: Sequence[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command without the user's variables SQUEUE_* and SACCT_*, which would change its answer.

    Args:
        command: words of the command.
        timeout: seconds to wait; None waits for ever.

    Raises:
        subprocess.TimeoutExpired: the command took longer.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)


def _squeue(*options: str) -> list[str]:
    """Lines of squeue about this user's jobs. Raises SlurmSilent if it does not answer, FlextronError if it is missing."""
    if not shutil.which("squeue"):
        raise FlextronError("squeue: not found: run this on a login node of the cluster")
    command, said = ["squeue", "--noheader", "--me", *options], ""
    since = time.monotonic()
    for attempt in range(QUESTIONS):
        try:
            answer = _answer(command, timeout=WAIT)
            if answer.returncode == 0:
                return answer.stdout.splitlines()
            said = answer.stderr.strip() or f"exit code {answer.returncode}"
        except subprocess.TimeoutExpired:
            said = f"no answer within {WAIT} s"
        if time.monotonic() - since > WAIT:
            break
        time.sleep(attempt)
    raise SlurmSilent(said)


def follow(results: Path, records: Sequence[Record], say: Callable[[str], None], interval: float = 5.0) -> list[State]:
    """Wait until every job has ended. Report changes of state at once, and progress once a minute.

    Args:
        results: run.results_dir.
        records: jobs to follow.
        say: receives a line for each report.
        interval: seconds between two questions to Slurm.

    Returns:
        The final state of each job.

    Raises:
        SlurmSilent: Slurm has not answered for PATIENCE seconds.
    """
    shown: dict[str, tuple[str, str]] = {}
    since: dict[str, float] = {}
    silent: float | None = None
    while True:
        try:
            found = states(results, records)
        except SlurmSilent as error:
            if silent is None:
                silent = time.monotonic()
                say(f"squeue: {error.said}; asking again")
            if time.monotonic() - silent > PATIENCE:
                raise
            time.sleep(interval)
            continue
        silent = None
        for state in found:
            name, now = state.record.name, (state.state, state.progress)
            changed = shown.get(name, ("", ""))[0] != state.state
            if changed or (now != shown[name] and time.monotonic() - since[name] > 60):
                say(f"{name:<14} {state.state.lower():<12} {state.progress}".rstrip())
                shown[name], since[name] = now, time.monotonic()
        if not any(state.alive for state in found):
            with contextlib.suppress(SlurmSilent):  # once more: logs and results may appear late on this machine
                found = states(results, records)
            return found
        time.sleep(interval)


def last_error(record: Record) -> str:
    """Last message ("flextron: error: ...") in which a job's stage says why it failed; empty if no log has one.

    The newest log that has such a message counts; of each log the last 100 kB are read.
    """
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
    """Lines in the last `size` bytes of a file; the first line may be incomplete."""
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
        done = record.steps * read / record.samples if exact else step  # steps, weighed by their batch sizes
        said += f"  {count(round(done * record.tokens))} tokens"
        if speeds and step < record.steps:
            hours = (record.steps - done) * record.tokens / median(speeds) / 3600
            said += f"  {hours:.2f} h and {hours * record.ranks:.2f} rank hours left"
    return said
