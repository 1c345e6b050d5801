"""Failure detection for the ranks of a job: when one rank dies, all ranks end within a minute, and one line names the dead rank.

Each rank watches the next rank; the last rank watches rank 0. A thread beside the training writes this rank's heartbeats to
torch's TCPStore and reads the heartbeats of the next rank. On the same machine /proc shows at once that a process has ended; on
another machine only missing heartbeats show it. A rank that finds a dead rank, or fails itself, writes a verdict (a line and an
exit code) to the store. The first verdict counts: its author prints the line, and all ranks end with the exit code, also ranks
that wait in a collective.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flextron_mcore.config import FlextronError

if TYPE_CHECKING:
    from torch.distributed import Store

PERIOD = 2.0  # seconds between two heartbeats
SILENCE = 30.0  # seconds without a heartbeat after which a rank counts as dead, once all ranks train; see `start`
LEAST = 10  # minimum of FLEXTRON_RANK_TIMEOUT in seconds: a few heartbeats
START = 600.0  # replaces SILENCE until all ranks train: imports and index building can hold the GIL for minutes
GRACE = 5.0  # seconds that a failing rank waits for rank 0 to report the error first, if rank 0 has the error as well
FAREWELL = 10.0  # seconds that the rank that prints the line waits for the other ranks to end
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # environment variables set by torchrun

_PROC = Path("/proc")
_current: Watch | None = None


def start() -> None:
    """Start to watch the next rank, if a launcher started this process as one of several ranks.

    The environment variable FLEXTRON_RANK_TIMEOUT replaces SILENCE. Raises FlextronError unless its value is a whole number of
    seconds of at least LEAST.
    """
    global _current, SILENCE
    if text := os.environ.get("FLEXTRON_RANK_TIMEOUT"):
        if not re.fullmatch(r"\d{1,6}", text) or int(text) < LEAST:
            raise FlextronError(f"FLEXTRON_RANK_TIMEOUT={text}: set it to whole seconds, at least {LEAST}, or unset it")
        SILENCE = float(text)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and all(name in os.environ for name in LAUNCH):
        _current = Watch()


def current() -> Watch | None:
    """Watch that `start` created in this process; None without one."""
    return _current


def all_train() -> None:
    """Shorten the tolerated time without heartbeats from START to SILENCE. Call when all ranks have begun to train."""
    if _current:
        _current.patience = SILENCE


class Watch:
    """Two threads that exchange heartbeats with the next rank and end this process when a rank dies.

    The threads run from construction until `leave`.
    """

    def __init__(self) -> None:
        from torch import distributed  # noqa: F401  imported before the threads start: they must not import it concurrently

        rank, world, local, host, port = (os.environ[name] for name in LAUNCH)
        self.rank, self.world, self.local = int(rank), int(world), int(local)
        self.address = host, int(port)
        # The launcher's process hosts the store, if True; else rank 0 does.
        self.from_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.has_store = self.rank == 0 and not self.from_launcher
        self.patience = START
        self.left = False
        self.turns = 0
        self.store: Store | None = None
        self.first: dict[str, Any] = {}  # host, pid and start time of rank 0, from `_identity`
        self._identity = _identity()
        self._records, self._ending = threading.Lock(), threading.Lock()
        for target in (self._watch, self._watch_store):
            threading.Thread(target=target, daemon=True).start()

    def fail(self, head: str, text: str, code: int, wait: float) -> NoReturn:
        """End this process and all other ranks because of an error in this process.

        Args:
            head: beginning of the line to print. If not empty, all ranks may have the same error: ranks other than 0 wait GRACE
                seconds longer, so that rank 0 reports it.
            text: rest of the line.
            code: exit code of all ranks.
            wait: seconds to wait for an earlier verdict of another rank.
        """
        self.patience = min(self.patience, SILENCE)
        if head and self.rank:
            wait, text = wait + GRACE, f"rank {self.rank}: {text}"
        if self.store or not self.has_store:
            time.sleep(wait)
        if self.store is None:
            self._end(head + text, code)
        self._propose(head + text, code)

    def leave(self, patience: float = START, last: bool = False) -> None:
        """Stop watching and tell the other ranks that this rank ends on purpose.

        The rank that hosts the store waits until all other ranks have called `leave`. patience: maximum seconds to wait. last:
        wait although this rank does not host the store, because it prints the line of the job.
        """

        def goodbye() -> None:
            with contextlib.suppress(RuntimeError):
                with self._records:
                    self.left = True
                    self._write("left")
                gone = self.store.add("gone", 1)
                while (last or self.has_store) and gone < self.world:
                    time.sleep(0.1)
                    gone = self.store.add("gone", 0)

        if self.store is None:
            self.left = True
            return
        thread = threading.Thread(target=goodbye, daemon=True)  # a dead store would block this thread
        thread.start()
        thread.join(patience if self.has_store else min(patience, SILENCE))  # only the rank with the store waits for others

    def _connect(self) -> Store:
        from torch.distributed import PrefixStore, TCPStore

        while not self.has_store:  # wait for the server here, because TCPStore prints a line for every attempt to connect
            try:
                socket.create_connection(self.address, PERIOD).close()
                break
            except OSError:
                time.sleep(0.2)
        store = TCPStore(
            *self.address,
            is_master=self.has_store,
            multi_tenant=True,  # shared with the store of init_process_group, which is closed earlier
            wait_for_workers=False,
            timeout=timedelta(seconds=START),  # also of calls, so that they survive the suspension of a job
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"flextron/{attempt}", store)

    def _write(self, beat: int | str) -> None:
        self.store.set(f"rank/{self.rank}", json.dumps({**self._identity, "beat": beat}))

    def _watch(self) -> None:
        neighbour = (self.rank + 1) % self.world
        try:
            self.store = self._connect()
            self._write(0)
            for key in (f"rank/{neighbour}", "rank/0", "verdict"):  # created here, because a read waits for a missing key
                self.store.compare_set(key, "", "null")
            seen, silent = b"", 0.0
            while True:
                with self._records:
                    if self.left:
                        return
                    self._write(self.turns)
                peer, first, verdict = self.store.multi_get([f"rank/{neighbour}", "rank/0", "verdict"])
                if verdict != b"null":
                    self._obey(json.loads(verdict))
                self.first = json.loads(first) or {}
                # Counted in turns of this loop, not in seconds: a job that was suspended as a whole has missed none.
                silent = silent + PERIOD if peer == seen else 0.0
                seen = peer
                if fault := self._fault(neighbour, silent, json.loads(peer)):
                    self._propose(f"flextron: failed: {fault}", 1, dead=1)
                self.turns += 1
                time.sleep(PERIOD)
        except RuntimeError:  # torch's errors of a store
            if self.store is None and self.has_store:
                self.left = True  # such as an address in use: init_process_group will fail for the same reason
            else:
                self._store_is_gone()

    def _fault(self, neighbour: int, silent: float, peer: dict[str, Any] | None) -> str | None:
        """Sentence on how the next rank died; None if the rank is alive, left on purpose, or may still start.

        neighbour: number of the next rank. silent: seconds since the last heartbeat of the next rank. peer: record of the next
        rank in the store, None before the rank has started.
        """
        name = self._name(neighbour, peer)
        if peer is None:
            return f"{name} did not start within {START:.0f} s" if silent >= START else None
        fate = None
        if self._is_here(peer):
            fate = self._fate(peer, silent)
        elif silent >= self.patience:
            fate = f"has given no sign of life for {self.patience:.0f} s: it died, or its machine did"
        if not fate or json.loads(self.store.get(f"rank/{neighbour}"))["beat"] == "left":
            return None
        return f"{name} {fate}"

    def _is_here(self, peer: dict[str, Any]) -> bool:
        return bool(peer["machine"]) and peer["machine"] == self._identity["machine"]

    def _fate(self, peer: dict[str, Any], silent: float) -> str | None:
        """Words for how a rank on this machine ended; None if its process runs, even without heartbeats. Kills a stopped one."""
        state = process_state(peer["pid"], peer["started"])
        if state is None:
            return "died"
        if state == "T" and silent >= SILENCE:
            with contextlib.suppress(ProcessLookupError):
                os.kill(peer["pid"], signal.SIGKILL)  # a stopped process would stay and keep its locks
            return f"was stopped for {SILENCE:.0f} s, and was killed"
        return None

    def _name(self, rank: int, peer: dict[str, Any] | None) -> str:
        return f"rank {rank} of {self.world}" + (f" (host {peer['host']}, pid {peer['pid']})" if peer else "")

    def _watch_store(self) -> None:
        """End the process if the thread of `_watch` hangs, because a call to a store on a dead machine may never return."""
        seen, silent = None, 0.0
        while not self.left:
            time.sleep(PERIOD)
            now = self.turns, self.store  # with the store, because connecting may take longer than a turn
            silent = silent + PERIOD if now == seen else 0.0
            seen = now
            if silent >= (SILENCE if self.store else START):
                self._store_is_gone()

    def _store_is_gone(self) -> None:
        """End this process after the store is lost. Without a common verdict, one rank of each machine prints a line."""
        time.sleep(PERIOD)  # a process that ends on purpose loses its connections before it has ended
        if self.left:
            return
        self.left = True
        if self.from_launcher:
            speaks = self.local == 0
            line = f"torchrun {self._fate_of_launcher() if speaks else ''}"
        else:
            here = bool(self.first) and self._is_here(self.first)
            speaks = self.local == int(here) or self.rank == 1
            fate = self._fate(self.first, SILENCE) if here and speaks else None
            known = "died, or its machine did" if self.store else "did not start"
            line = f"{self._name(0, self.first or None)} {fate or known}"
        self._end(f"flextron: failed: {line}" if speaks else "", 1)

    def _fate_of_launcher(self) -> str:
        parent = os.getppid()
        with contextlib.suppress(OSError):
            if _stat(parent)[0] == "T":
                os.kill(parent, signal.SIGKILL)
                return f"(pid {parent}) was stopped for {SILENCE:.0f} s, and was killed"
        return "on {}:{} died, or its machine did".format(*self.address)

    def _propose(self, line: str, code: int, dead: int = 0) -> NoReturn:
        """Write a verdict to the store unless there is one, and end by the valid one. dead: ranks that will not call `leave`."""
        mine = json.dumps({"by": self.rank, "line": line, "code": code})
        try:
            verdict = self.store.compare_set("verdict", "null", mine)
            self.store.add("gone", dead if verdict == mine.encode() else 0)
        except RuntimeError:
            self._store_is_gone()
            self._end("", code)
        self._obey(json.loads(verdict))

    def _obey(self, verdict: dict[str, Any]) -> NoReturn:
        self._end(verdict["line"] if verdict["by"] == self.rank else "", verdict["code"])

    def _end(self, line: str, code: int) -> NoReturn:
        self._ending.acquire()  # never released: the other thread waits here until the process ends
        if not self.left:
            self.leave(FAREWELL, last=bool(line))
        if line:
            os.write(2, f"{line}\n".encode())
        os._exit(code)


def _identity() -> dict[str, Any]:
    """Host, pid, start time and `machine` of this process.

    Processes with equal `machine` (boot id and pid namespace) see each other in /proc; "" without /proc.
    """
    # Slurm's name of the node, if there is one: a job's script excludes the node by it.
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    values = {"host": host, "pid": os.getpid(), "started": 0, "machine": ""}
    with contextlib.suppress(OSError):
        values["machine"] = (_PROC / "sys/kernel/random/boot_id").read_text() + os.readlink(_PROC / "self/ns/pid")
        values["started"] = int(_stat("self")[19])
    return values


def process_state(pid: int, started: int) -> str | None:
    """State of a process on this machine, as the kernel's letter (R, S, D, T ...); None if the process has ended.

    started: start time in clock ticks after boot, which tells the process from a later one with the same pid.
    """
    try:
        fields = _stat(pid)
    except OSError:
        return None
    return fields[0] if int(fields[19]) == started and fields[0] not in "ZX" else None


def _stat(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat after the name: the first is the state, the 20th the start time in clock ticks."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
