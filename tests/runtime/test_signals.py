"""SIGTERM and SIGUSR1: noted while training, the end otherwise; never for the processes that write a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from flextron_mcore.runtime import signals


@pytest.fixture
def ends():
    """The signals taken over for a test: what they ended the process with."""
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    interrupt = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it, and its children do
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
    os.kill(os.getpid(), signal.SIGTERM)  # while it ends
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
    assert signals.received() == signal.SIGTERM  # what came in the meantime is not lost
