"""Inputs for the tests of hostile files, which spoil copies of them, and limits of time and memory for every test."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint, write_info
from flextron_mcore.config import FlextronError
from flextron_mcore.runs.start import run_stage
from flextron_mcore.settings.compose import compose
from flextron_mcore.space import ElasticSpace
from tests import hf_toy, toy

# Most processor time and memory of a command that gets a hostile file.
SECONDS, BYTES = 30, 2 * 2**30
WAIT = 8 * SECONDS  # most wall-clock time, beside other tests: more is taken for a command that hangs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """Directory with what commands read: text.txt, data/, run/ (a checkpoint with a tokenizer), hf/, net.json, net.yaml."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "text.txt").write_text("".join(f"Line {i} of a text with {i * i} words.\n" for i in range(200)))
    stage("prepare", f"input={root}/text.txt", "vocab_size=300", "valid_fraction=0.2", f"out={root}/data")
    vocabulary = json.loads((root / "data" / "data.json").read_text())["vocab_size"]
    arch = toy.config(vocab_size=vocabulary)
    info = CheckpointInfo(arch, ElasticSpace.build(arch), sorted=True)
    toy.write(toy.model(arch, info.space), info, root / "run")
    shutil.copytree(root / "data" / "tokenizer", root / "run" / "tokenizer")
    hf_toy.save(hf_toy.llama(), root / "hf")
    for file in (root / "data" / "tokenizer").iterdir():
        shutil.copy(file, root / "hf")
    (root / "net.json").write_text(toy.random_network(arch, info.space, 1).to_json())
    return root


@dataclass(frozen=True)
class Copy:
    """Copy of `inputs` that a test may spoil. marker: file that code in a hostile file would create."""

    root: Path
    marker: Path

    @property
    def checkpoint(self) -> Path:
        """Directory of the checkpoint."""
        return self.root / "run" / "checkpoints" / "iter_0000000"

    def describe(self) -> None:
        """Write flextron.json anew with digests of the spoilt files, as the author of a hostile checkpoint would."""
        (self.checkpoint / "flextron.json").unlink()
        write_info(self.checkpoint, self.info)

    @property
    def info(self) -> CheckpointInfo:
        """Description of the checkpoint before it was spoiled."""
        return open_checkpoint(self.root.parent / "good")


@pytest.fixture
def copy(inputs, tmp_path) -> Copy:
    shutil.copytree(inputs, tmp_path / "in")
    (tmp_path / "good").symlink_to(inputs / "run")
    return Copy(tmp_path / "in", tmp_path / "marker")


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """Fail a test that takes more than WAIT seconds between two refusals, or BYTES more memory than before it."""

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {WAIT} seconds")

    before = signal.signal(signal.SIGALRM, late)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present use
    start = memory("VmRSS")
    signal.alarm(WAIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert memory("VmHWM") - start < BYTES


def memory(name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def stage(name: str, *keys: str) -> dict:
    return run_stage(compose(name, keys))


def refusal(name: str, *keys: str) -> str:
    """Message with which a command refuses its input; it has one line."""
    signal.alarm(WAIT)
    begun = time.process_time()
    with pytest.raises(FlextronError) as caught:
        stage(name, *keys)
    assert time.process_time() - begun < SECONDS
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "Traceback" not in message
    return message
