"""SIGTERM and SIGUSR1 stop a training after its step and end other work at once; writers of a checkpoint never get them."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from flextron_mcore import cli
from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import signals
from flextron_mcore.training.checks import end_of_job


@pytest.fixture
def ends():
    """List that collects the (text, exit code) with which signals would end the process. Handlers are installed for the test."""
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    # If the tests run as a background job of a shell, SIGINT is ignored here.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = []
    signals.install(lambda text, code: calls.append((text, code)))
    yield calls
    signals.defer(False)
    for number, handler in zip((*signals.SIGNALS, signal.SIGINT), (*before, interrupt), strict=True):
        signal.signal(number, handler)


def test_a_signal_ends_the_process_once(ends):
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert ends == [("flextron: stopped by SIGUSR1", 138)]


def test_a_deferred_signal_is_noted(ends):
    signals.defer(True)
    assert signals.received() == 0
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.received() == signal.SIGTERM and not ends
    with pytest.raises(signals.Stopped, match="elastic: stopped by SIGTERM after step 3; its checkpoint is written"):
        signals.stop(signals.received(), "elastic", 3)
    signals.defer(False)
    os.kill(os.getpid(), signal.SIGTERM)  # a second signal while the process ends
    assert signals.received() == 0 and not ends


def test_helpers_of_a_save_are_deaf(ends):
    signals.defer(True)
    with signals.deaf_helpers():
        deaf = subprocess.Popen(["sleep", "100"])
        os.kill(os.getpid(), signal.SIGTERM)
    hearing = subprocess.Popen(["sleep", "100"])
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        deaf.send_signal(number)
    hearing.send_signal(signal.SIGINT)
    assert hearing.wait(60) == -signal.SIGINT
    assert deaf.poll() is None
    deaf.kill()
    deaf.wait()
    assert signals.received() == signal.SIGTERM  # a signal that came in the meantime is not lost


def test_the_earlier_of_two_time_limits_counts(ends):
    signals.defer(True)
    for seconds, until, reached in ((None, None, False), (1e6, None, False), (0.0, None, True), (None, time.time() - 1, True)):
        signals.limit(seconds, until)
        assert signals.received() == ((signals.JOB_ENDS if until else signals.TIME_IS_UP) if reached else 0)
    signals.limit(1e6, time.time() - 1)
    assert signals.received() == signals.JOB_ENDS
    signals.limit(0.0, time.time() + 1e6)
    assert signals.received() == signals.TIME_IS_UP
    signals.limit(None)
    assert signals.received() == 0


def test_a_process_stops_while_it_has_time_to_save(ends):
    signals.defer(True)
    signals.limit(None, None, time.time() + 1000)
    assert signals.received() == signals.received(900.0) == 0
    assert signals.received(1001.0) == signals.JOB_ENDS
    signals.limit(None, time.time() + 1e6, time.time() - 1)
    assert signals.received() == signals.JOB_ENDS
    signals.limit(None)
    assert signals.received(1e9) == 0


def test_the_end_of_a_job_is_read_from_its_script(monkeypatch):
    names = ("FLEXTRON_STOP_AT", "FLEXTRON_JOB_END")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert end_of_job() == (None, None)
    monkeypatch.setenv("FLEXTRON_STOP_AT", "1700000000")
    assert end_of_job() == (1700000000.0, None)
    monkeypatch.setenv("FLEXTRON_JOB_END", "1700000200")
    assert end_of_job() == (1700000000.0, 1700000200.0)
    for name in names:
        monkeypatch.setenv(name, "soon")
        with pytest.raises(FlextronError, match=f"{name}=soon: is not a number of seconds since 1970: unset this variable"):
            end_of_job()
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "number, words",
    [(signal.SIGKILL, "killed by SIGKILL, perhaps for lack of memory; "), (signal.SIGSEGV, "killed by SIGSEGV; ")],
)
def test_the_signal_that_killed_a_helper_is_named(number, words):
    child = None
    with pytest.raises(FlextronError, match=words):
        with signals.deaf_helpers():
            child = subprocess.Popen(["sleep", "100"])
            child.send_signal(number)
            time.sleep(30)
    child.wait()


def test_only_a_process_that_writes_is_taken_for_one():
    """In deaf_helpers, a child from before, such as a logger's, may be killed. A writer may not, even one of an earlier block."""
    other = subprocess.Popen(["sleep", "100"])
    with signals.deaf_helpers():
        writer = subprocess.Popen(["sleep", "100"])
        other.kill()
        time.sleep(1)
    with pytest.raises(FlextronError, match="killed by SIGKILL"), signals.deaf_helpers():
        writer.kill()
        time.sleep(30)
    other.wait()
    writer.wait()


@pytest.mark.parametrize("turn", [1, 2])
def test_a_command_in_a_test_leaves_the_signals_as_they_were(turn):
    """A command leaves SIGTERM ignored, which children of later tests would inherit: a fixture of conftest.py restores it."""
    assert signal.SIG_IGN not in (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1))
    with pytest.raises(SystemExit):
        cli.main(["--version"])
