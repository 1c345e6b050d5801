"""Watch of ranks: ranks that die, stop, fail or only take long. All scenarios run at the same time, each in its own processes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import watch
from flextron_mcore.runtime.watch import Watch

SILENCE = 6.0


def meet(own: Watch, place: str) -> None:
    """Wait until all ranks of the scenario are here and know each other."""
    turns = own.turns + 3
    while own.turns < turns:
        time.sleep(0.05)
    here = Path(os.environ["SCENARIO"])
    here.with_suffix(f".{place}{own.rank}").touch()
    while not all(here.with_suffix(f".{place}{rank}").exists() for rank in range(own.world)):
        time.sleep(0.05)


def run_until_ended() -> None:
    time.sleep(120)
    os._exit(99)


def hold_the_interpreter(seconds: float) -> None:
    """Block all threads of this process, as an import or an extension may do."""
    ctypes.PyDLL(None).usleep(ctypes.c_uint(int(seconds * 1e6)))


def signal_itself(rank: int, number: int) -> Callable[[int, Watch], None]:
    def scenario(own_rank: int, own: Watch) -> None:
        if own_rank == rank:
            os.kill(os.getpid(), number)
        run_until_ended()

    return scenario


def on_machines_of_their_own(scenario: Callable[[int, Watch], None], training: bool) -> Callable[[int, Watch], None]:
    def elsewhere(rank: int, own: Watch) -> None:
        own._identity["machine"] += str(rank)
        meet(own, "elsewhere")
        if training:
            watch.all_train()
        scenario(rank, own)

    return elsewhere


def take_long(rank: int, own: Watch) -> None:
    if rank == 1:
        hold_the_interpreter(1.5 * SILENCE)
    else:
        time.sleep(1.5 * SILENCE)


def take_long_in_training(rank: int, own: Watch) -> None:
    watch.all_train()
    take_long(rank, own)


def suspended_together(rank: int, own: Watch) -> None:
    if rank == 0:
        stopped = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
        script = f"kill -STOP {' '.join(stopped)}; sleep {1.5 * SILENCE}; "
        script += "; sleep 1; ".join(f"kill -CONT {pid}" for pid in stopped)
        subprocess.Popen(["sh", "-c", script], start_new_session=True)
    time.sleep(1.5 * SILENCE + 6)


def same_error(rank: int, own: Watch) -> None:
    time.sleep(2 if rank == 0 else 0)
    own.fail("flextron: error: ", "no such file", 2, wait=0)


def error_of_one(rank: int, own: Watch) -> None:
    if rank == 1:
        own.fail("flextron: error: ", "no such file", 2, wait=0)
    run_until_ended()


def error_for_a_dead_rank(rank: int, own: Watch) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    own.fail("flextron: failed: ", "connection closed by peer", 1, wait=SILENCE)


def error_without_another(rank: int, own: Watch) -> None:
    own.fail("flextron: failed: ", "connection closed by peer", 1, wait=1)


def last_leaves_early(rank: int, own: Watch) -> None:
    if rank < 2:
        time.sleep(1.5 * SILENCE)


def first_leaves_early(rank: int, own: Watch) -> None:
    if rank > 0:
        time.sleep(3)


def launcher_killed(rank: int, own: Watch) -> None:
    if rank == 0:
        os.kill(int(os.environ["LAUNCHER"]), signal.SIGKILL)
    run_until_ended()


class Outcome(NamedTuple):
    codes: list[int]
    pids: list[int]
    lines: list[str]

    def name(self, rank: int) -> str:
        return f"rank {rank} of {len(self.codes)} (host {socket.gethostname()}, pid {self.pids[rank]})"


SCENARIOS: dict[str, Callable[[int, Watch], None]] = {
    "killed": signal_itself(2, signal.SIGKILL),
    "host of the store killed": signal_itself(0, signal.SIGKILL),
    "stopped": signal_itself(1, signal.SIGSTOP),
    "host of the store stopped": signal_itself(0, signal.SIGSTOP),
    "silent elsewhere": on_machines_of_their_own(signal_itself(1, signal.SIGSTOP), training=True),
    "long start elsewhere": on_machines_of_their_own(take_long, training=False),
    "long step": take_long_in_training,
    "suspended": on_machines_of_their_own(suspended_together, training=True),
    "same error": same_error,
    "error of one": error_of_one,
    "error for a dead rank": error_for_a_dead_rank,
    "error without another": error_without_another,
    "last leaves early": last_leaves_early,
    "last leaves early elsewhere": on_machines_of_their_own(last_leaves_early, training=True),
    "first leaves early": first_leaves_early,
    "launcher killed": launcher_killed,
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict[str, Outcome]:
    """{scenario: Outcome}."""
    folder = tmp_path_factory.mktemp("watch")
    command = [sys.executable, "-m", "tests.runtime.test_watch", str(folder)]
    subprocess.run(command, cwd=Path(__file__).resolve().parents[2], check=True, timeout=300)
    return {name: Outcome(*json.loads((folder / name).read_text())) for name in SCENARIOS}


def test_a_killed_rank_ends_all_and_is_named_once(outcome):
    found = outcome["killed"]
    assert found.codes == [1, 1, -signal.SIGKILL]
    assert found.lines == [f"flextron: failed: {found.name(2)} died"]


def test_a_stopped_rank_is_killed_and_named(outcome):
    found = outcome["stopped"]
    assert found.codes == [1, -signal.SIGKILL, 1]
    assert found.lines == [f"flextron: failed: {found.name(1)} was stopped for {SILENCE:.0f} s, and was killed"]


def test_without_the_store_one_rank_names_its_host(outcome):
    found = outcome["host of the store killed"]
    assert found.codes == [-signal.SIGKILL, 1, 1]
    assert found.lines == [f"flextron: failed: {found.name(0)} died"]
    found = outcome["host of the store stopped"]
    assert found.codes == [-signal.SIGKILL, 1, 1]
    assert found.lines == [f"flextron: failed: {found.name(0)} was stopped for {SILENCE:.0f} s, and was killed"]


def test_silence_is_death_on_another_machine(outcome):
    found = outcome["silent elsewhere"]
    assert found.codes == [1, -signal.SIGKILL, 1]  # the test killed rank 1, as no rank can on another machine
    line = f"flextron: failed: {found.name(1)} has given no sign of life for {SILENCE:.0f} s: it died, or its machine did"
    assert found.lines == [line]


@pytest.mark.parametrize("name", ["long start elsewhere", "long step", "suspended"])
def test_what_takes_long_is_not_death(outcome, name):
    found = outcome[name]
    assert (found.codes, found.lines) == ([0, 0, 0], [])


def test_an_error_is_printed_by_one_rank(outcome):
    found = outcome["same error"]
    assert found.codes == [2, 2, 2] and found.lines == ["flextron: error: no such file"]
    found = outcome["error of one"]
    assert found.codes == [2, 2, 2] and found.lines == ["flextron: error: rank 1: no such file"]


def test_an_error_waits_for_its_cause(outcome):
    found = outcome["error for a dead rank"]
    assert found.codes == [1, -signal.SIGKILL, 1] and found.lines == [f"flextron: failed: {found.name(1)} died"]
    found = outcome["error without another"]
    assert found.codes == [1, 1, 1] and found.lines == ["flextron: failed: connection closed by peer"]


@pytest.mark.parametrize("name", ["last leaves early", "last leaves early elsewhere", "first leaves early"])
def test_a_rank_that_is_done_is_not_dead(outcome, name):
    found = outcome[name]
    assert (found.codes, found.lines) == ([0, 0, 0], [])


def test_ranks_end_with_their_launcher(outcome):
    found = outcome["launcher killed"]
    assert found.codes == [1, 1, 1]
    assert len(found.lines) == 1 and found.lines[0].startswith("flextron: failed: torchrun on 127.0.0.1:")


def test_a_process_is_known_by_its_start_too():
    started = int(watch._stat("self")[19])
    assert watch.process_state(os.getpid(), started) in "RS"
    assert watch.process_state(os.getpid(), started + 1) is None  # another start time: the number belongs to another process


def test_a_store_that_was_long_in_coming_is_not_gone(monkeypatch):
    """The time limit of a look at the store starts after connecting, which has a longer limit of its own."""
    for name, value in {"PERIOD": 0.02, "SILENCE": 1.0, "START": 60.0}.items():
        monkeypatch.setattr(watch, name, value)
    own, gone = Watch.__new__(Watch), threading.Event()
    own.left, own.turns, own.store = False, 0, None
    monkeypatch.setattr(own, "_store_is_gone", lambda: (gone.set(), setattr(own, "left", True)))
    threading.Thread(target=own._watch_store, daemon=True).start()
    assert not gone.wait(1.5)
    own.store = object()
    assert not gone.wait(0.25)  # a limit counted from the start would run out at the next look
    assert gone.wait(10)


def test_one_process_has_no_watch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    watch.start()
    assert watch.current() is None


def _rank(name: str, rank: int) -> None:
    """One rank of a scenario; never returns."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    watch.start()
    own = watch.current()
    meet(own, "watching")
    SCENARIOS[name](rank, own)
    own.leave()
    os._exit(0)


def _world(name: str, results: Path, ranks: int = 3) -> None:
    """Run a scenario in forked processes, and write its outcome to a file of `results`."""
    errors = results.with_suffix(".err")
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SCENARIO=str(results))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    if name == "launcher killed":
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        if (launcher := os.fork()) == 0:
            store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # noqa: F841  lives as long as its name
            signal.pause()
        os.environ["LAUNCHER"] = str(launcher)
    pids = []
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            _rank(name, rank)
        pids.append(pid)
    codes = {}
    while not codes.keys() >= set(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if name == "silent elsewhere" and len(codes) == ranks - 1:
            os.kill(pids[1], signal.SIGKILL)
    results.write_text(json.dumps([[codes[pid] for pid in pids], pids, errors.read_text().splitlines()]))


def _worlds(folder: Path) -> None:
    """Run all scenarios at the same time, each in forked processes, because importing torch takes longer than most."""
    watch.PERIOD, watch.SILENCE, watch.GRACE, watch.START = 0.1, SILENCE, 15.0, 120.0
    for name in SCENARIOS:
        if os.fork() == 0:
            _world(name, folder / name)
            os._exit(0)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


if __name__ == "__main__":
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    from torch.distributed import TCPStore

    _worlds(Path(sys.argv[1]))


@pytest.mark.parametrize("text", ["9", "soon", "-30", "1e9"])
def test_the_time_without_heartbeats_is_whole_seconds(monkeypatch, text):
    monkeypatch.setenv("FLEXTRON_RANK_TIMEOUT", text)
    with pytest.raises(FlextronError, match=f"FLEXTRON_RANK_TIMEOUT={text}: set it to whole seconds, at least 10, or unset it"):
        watch.start()


def test_the_time_without_heartbeats_can_be_set(monkeypatch):
    monkeypatch.setattr(watch, "SILENCE", watch.SILENCE)
    monkeypatch.setenv("FLEXTRON_RANK_TIMEOUT", "120")
    watch.start()
    assert watch.SILENCE == 120 and watch.current() is None
