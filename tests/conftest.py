"""Every test runs as a world of one process on the CPU runtime (or one GPU)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

from flextron_mcore.runtime.environment import prepare_environment

prepare_environment()

import pytest  # noqa: E402
import torch  # noqa: E402

from flextron_mcore.runtime import distributed  # noqa: E402

# Tests that start several processes each, which would only wait for each other if they ran side by side.
MANY_PROCESSES = ("tests/slurm", "tests/parallel", "tests/examples")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> object:
    """With `-n` (pytest-xdist), a file's tests stay on one worker, as do all those of MANY_PROCESSES together."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "processes" if nodeid.startswith(MANY_PROCESSES) else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: begun last, it would leave one worker alone with it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not item.nodeid.startswith(MANY_PROCESSES))


@pytest.fixture(scope="session", autouse=True)
def process_groups():
    distributed.initialize(seed=1234)
    yield
    distributed.shutdown()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1234)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Two domains of real text: parts of this package's sources, as they once were: it must not change with them."""
    folder = tmp_path_factory.mktemp("text")
    shutil.unpack_archive(Path(__file__).with_name("text.zip"), folder)
    return folder


@pytest.fixture
def make_disk(tmp_path):
    """make_disk(size) -> the directory of a file system of that size."""
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
