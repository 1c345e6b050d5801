"""Ends a job of many ranks when one of them dies, within a minute and everywhere, with one line that names it.

Each rank watches the next one (the last watches rank 0): beside the training, a thread writes signs of life to torch's TCPStore
and reads the neighbour's. On one machine /proc tells at once that a process is gone; of another machine only silence tells.
Whoever finds a dead rank, or fails itself, proposes a verdict to the store. The first one counts: its author prints it, and all
end with its exit code, also those that wait in a collective for a rank that never comes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch.distributed import Store

PERIOD = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one that are taken for death when all ranks train
START = 600.0  # the same until then: imports and index building can keep Python's lock, and with it the threads, for minutes
GRACE = 5.0  # seconds that a rank with an error leaves rank 0 to report the same one
FAREWELL = 10.0  # seconds that the rank with the last word waits for the others to end
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for each process

_PROC = Path("/proc")
_current: Watch | None = None


def start() -> None:
    """Start the watch of this process, if it is one of many."""
    global _current
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and all(name in os.environ for name in LAUNCH):
        _current = Watch()


def current() -> Watch | None:
    """The watch of this process; None where none was started."""
    return _current


def all_train() -> None:
    """All ranks are known to train: from now on a short silence is suspicious."""
    if _current:
        _current.patience = SILENCE


class Watch:
    """One rank's watch over the next. Its threads run from its construction to `leave`."""

    def __init__(self) -> None:
        from torch import distributed  # noqa: F401  here, because two threads must not import it at the same time

        rank, world, local, host, port = (os.environ[name] for name in LAUNCH)
        self.rank, self.world, self.local = int(rank), int(world), int(local)
        self.address = host, int(port)
        self.from_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the store; else rank 0 has it
        self.has_store = self.rank == 0 and not self.from_launcher
        self.patience = START
        self.left = False
        self.turns = 0
        self.store: Store | None = None
        self.first: dict[str, Any] = {}  # who rank 0 is
        self._identity = _identity()
        self._records, self._ending = threading.Lock(), threading.Lock()
        for target in (self._watch, self._watch_store):
            threading.Thread(target=target, daemon=True).start()

    def fail(self, head: str, text: str, code: int, wait: float) -> NoReturn:
        """End this process, and with it the job, because of an error of its own.

        head, text: the line to print; with a head the error may be all ranks', and rank 0 gets the time to report it first.
        wait: seconds in which a verdict of others may end it instead.
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
        """Say goodbye. The rank that has the store, and the one with the last word, stay until all others have."""

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
        thread = threading.Thread(target=goodbye, daemon=True)  # the store may be dead, and would keep this thread
        thread.start()
        thread.join(patience)

    def _connect(self) -> Store:
        from torch.distributed import PrefixStore, TCPStore

        while not self.has_store:  # TCPStore itself prints every attempt
            try:
                socket.create_connection(self.address, PERIOD).close()
                break
            except OSError:
                time.sleep(0.2)
        store = TCPStore(
            *self.address,
            is_master=self.has_store,
            multi_tenant=True,  # with the one that init_process_group makes; ours outlives it
            wait_for_workers=False,
            timeout=timedelta(seconds=START),  # of calls too, which must outlast a suspended job
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
            for key in (f"rank/{neighbour}", "rank/0", "verdict"):  # reading a key that is not there waits for it
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
                # Turns of our own, not seconds: a job that was suspended as a whole has missed none.
                silent = silent + PERIOD if peer == seen else 0.0
                seen = peer
                if fault := self._fault(neighbour, silent, json.loads(peer)):
                    self._propose(f"flextron: failed: {fault}", 1, dead=1)
                self.turns += 1
                time.sleep(PERIOD)
        except RuntimeError:  # torch's errors of a store
            if self.store is None and self.has_store:
                self.left = True  # the address is taken, say: init_process_group will meet the same
            else:
                self._store_is_gone()

    def _fault(self, neighbour: int, silent: float, peer: dict[str, Any] | None) -> str | None:
        """Sentence that says what is wrong with the next rank; None if nothing is, or nothing is known."""
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
        """Words for how a rank of this machine ended; None if it runs, even if it is silent."""
        state = process_state(peer["pid"], peer["started"])
        if state is None:
            return "died"
        if state == "T" and silent >= SILENCE:
            with contextlib.suppress(ProcessLookupError):
                os.kill(peer["pid"], signal.SIGKILL)  # else it would stay behind, and keep what it has locked
            return f"was stopped for {SILENCE:.0f} s, and was killed"
        return None

    def _name(self, rank: int, peer: dict[str, Any] | None) -> str:
        return f"rank {rank} of {self.world}" + (f" (host {peer['host']}, pid {peer['pid']})" if peer else "")

    def _watch_store(self) -> None:
        """A call to the store of a machine that is gone may never return: notice that the other thread makes no turns."""
        seen, silent = None, 0.0
        while not self.left:
            time.sleep(PERIOD)
            now = self.turns, self.store  # the store too: connecting may have taken longer than a turn may
            silent = silent + PERIOD if now == seen else 0.0
            seen = now
            if silent >= (SILENCE if self.store else START):
                self._store_is_gone()

    def _store_is_gone(self) -> None:
        """End without the store, through which the ranks would agree on who speaks: one a machine prints what it knows."""
        time.sleep(PERIOD)  # a process that ends loses its connections first
        if self.left:
            return
        self.left = True
        if self.from_launcher:
            line, speaks = "torchrun on {}:{} died, or its machine did".format(*self.address), self.local == 0
        else:
            here = bool(self.first) and self._is_here(self.first)
            speaks = self.local == int(here) or self.rank == 1
            fate = self._fate(self.first, SILENCE) if here and speaks else None
            known = "died, or its machine did" if self.store else "did not start"
            line = f"{self._name(0, self.first or None)} {fate or known}"
        self._end(f"flextron: failed: {line}" if speaks else "", 1)

    def _propose(self, line: str, code: int, dead: int = 0) -> NoReturn:
        """Make a verdict, unless there is one, and obey it. dead: how many ranks will not say goodbye."""
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
        self._ending.acquire()  # never released: another thread that comes here waits for the end
        if not self.left:
            self.leave(FAREWELL, last=bool(line))
        if line:
            os.write(2, f"{line}\n".encode())
        os._exit(code)


def _identity() -> dict[str, Any]:
    """Who this process is. Processes see each other in /proc if their `machine` is the same; "" where there is no /proc."""
    values = {"host": socket.gethostname(), "pid": os.getpid(), "started": 0, "machine": ""}
    with contextlib.suppress(OSError):
        values["machine"] = (_PROC / "sys/kernel/random/boot_id").read_text() + os.readlink(_PROC / "self/ns/pid")
        values["started"] = int(_stat("self")[19])
    return values


def process_state(pid: int, started: int) -> str | None:
    """The kernel's letter for the state of a process of this machine; None if it has ended. started: clock ticks after boot."""
    try:
        fields = _stat(pid)
    except OSError:
        return None
    return fields[0] if int(fields[19]) == started and fields[0] not in "ZX" else None


def _stat(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat after the name: the state is the first, the time of the start the 20th."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
