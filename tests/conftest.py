"""Fixtures of all tests. Every test runs in a process group of one process, on the CPU runtime or on one GPU."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import zlib
from collections.abc import Generator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

from flextron_mcore.runtime.environment import prepare_environment

prepare_environment()

from flextron_mcore.runtime.cpu import import_megatron  # noqa: E402

import_megatron()  # before any other import of Megatron-Core: without torch.compile, the import takes half the time

import pytest  # noqa: E402
import torch  # noqa: E402

from flextron_mcore.runtime import distributed, signals  # noqa: E402
from tests import messages  # noqa: E402

messages.record()
if "FLEXTRON_MESSAGES" in os.environ:  # processes that tests start note their refusals, too (tests/provoked)
    os.environ["FLEXTRON_MESSAGES"] = os.path.abspath(os.environ["FLEXTRON_MESSAGES"])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(messages.PROVOKED), os.environ.get("PYTHONPATH")]))

# Folders of tests that start several processes each. Side by side they would compete for the cores.
MANY_PROCESSES = ("tests/slurm", "tests/parallel", "tests/examples", "tests/faults")
# Files that take minutes each. Started last, they would keep one worker busy while the others are idle.
LONG = (
    "tests/test_gpu_code.py",
    "tests/training/test_gumbel.py",
    "tests/training/test_candidates.py",
    "tests/training/test_static.py",
)
# Folders whose tests run while no other worker runs one: their ranks wait for each other all the time, so that one rank without a
# core makes all of them several times slower.
ALONE = ("tests/parallel",)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> object:
    """With `-n` (pytest-xdist), keep the tests of a file on one worker, and all of MANY_PROCESSES together on one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "processes" if nodeid.startswith(MANY_PROCESSES) else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n`, start the tests of MANY_PROCESSES first, then those of LONG, so that no worker is left with them at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: (not item.nodeid.startswith(MANY_PROCESSES), not item.nodeid.startswith(LONG)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """With `-n`, run the tests of ALONE while no other worker runs a test."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with _lock_file().open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if item.nodeid.startswith(ALONE) else fcntl.LOCK_SH)
        return (yield)


def pytest_sessionfinish() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        _lock_file().unlink(missing_ok=True)


def _lock_file() -> Path:
    """File that a worker locks while it runs a test: alone for tests of ALONE, else together with others."""
    return Path(tempfile.gettempdir(), f"flextron-tests-{os.environ['PYTEST_XDIST_TESTRUNUID']}.lock")


@pytest.fixture(scope="session", autouse=True)
def process_groups():
    distributed.initialize(seed=1234)
    yield
    distributed.shutdown()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed by the test's name before its fixtures run, so that models made by fixtures do not depend on the tests before."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def signals_as_before():
    """Restore signal handlers: a command ignores signals once it ends, which in the tests' process would outlive it."""
    before = {number: signal.getsignal(number) for number in (*signals.SIGNALS, signal.SIGINT, signal.SIGCHLD)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def refusals_name_what_can_be_typed():
    """Assert that every key and command in the refusals that a test provokes can be typed for the stage that refused."""
    messages.take_recorded()
    yield
    provoked = {(site, stage, text): site.faults(stage, text) for site, stage, text in messages.take_recorded()}
    assert not {text: faults for (_, _, text), faults in provoked.items() if faults}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Directory with two domains of real text, code/ and prose/: an old copy of this package's sources, which stays as it is."""
    folder = tmp_path_factory.mktemp("text")
    shutil.unpack_archive(Path(__file__).with_name("text.zip"), folder)
    return folder


@pytest.fixture
def make_disk(tmp_path):
    """Function that mounts an empty file system of a given size, such as `2m`, and returns its directory."""
    disk = tmp_path / "disk"

    def make(size: str):
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            disk.rmdir()
            pytest.skip("mounting a small file system needs root")
        return disk

    yield make
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)
