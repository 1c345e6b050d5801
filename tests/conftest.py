"""Fixtures of all tests. Every test runs in a process group of one process, on the CPU runtime or on one GPU."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

from flextron_mcore.runtime.environment import prepare_environment

prepare_environment()

from flextron_mcore.runtime.cpu import import_megatron  # noqa: E402

import_megatron()  # as the command line does: without it, Megatron-Core's squared ReLU and others are compiled in every process

import pytest  # noqa: E402
import torch  # noqa: E402

from flextron_mcore.runtime import distributed  # noqa: E402
from tests import messages  # noqa: E402

messages.record()
if "FLEXTRON_MESSAGES" in os.environ:  # processes that tests start note their refusals, too (tests/provoked)
    os.environ["FLEXTRON_MESSAGES"] = os.path.abspath(os.environ["FLEXTRON_MESSAGES"])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(messages.PROVOKED), os.environ.get("PYTHONPATH")]))

# Tests that start several processes each: side by side they would only wait for each other.
MANY_PROCESSES = ("tests/slurm", "tests/parallel", "tests/examples", "tests/faults")
# Files that take minutes each: started last, one worker would run them while the others are idle.
LONG = (
    "tests/test_gpu_code.py",
    "tests/training/test_gumbel.py",
    "tests/training/test_candidates.py",
    "tests/training/test_static.py",
)
# Tests whose processes wait for each other all the time: another worker's tests would make them several times slower.
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
    """Run MANY_PROCESSES first, then LONG: started last they would run while the other workers are idle."""
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
    """File that the workers of a run lock."""
    return Path(tempfile.gettempdir(), f"flextron-tests-{os.environ['PYTEST_XDIST_TESTRUNUID']}.lock")


@pytest.fixture(scope="session", autouse=True)
def process_groups():
    distributed.initialize(seed=1234)
    yield
    distributed.shutdown()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def refusals_name_what_can_be_typed():
    """Every key and command in a refusal that the test provokes is one of the stage that refuses."""
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
