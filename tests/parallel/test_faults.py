"""Ranks that die, stop or fail, and signals: the job ends soon, says why, and the same command continues it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from flextron_mcore.checkpoint.store import CheckpointInfo, list_checkpoints
from flextron_mcore.runtime.watch import LAUNCH
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.stages.conftest import stage

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = 8, 3


@dataclass
class Job:
    """Processes of one training run, all of which carry a mark in their environment, as do their helpers."""

    out: Path
    processes: list[subprocess.Popen]
    mark: str
    started: float = field(default_factory=time.monotonic)

    def finish(self) -> tuple[list[int], list[str]]:
        """Exit codes, and the lines that all processes printed."""
        output = [process.communicate(timeout=240)[0] for process in self.processes]
        return [process.returncode for process in self.processes], "".join(output).splitlines()

    def left_behind(self, seconds: float = 10) -> list[str]:
        """The processes of the job that have not ended after so long."""
        deadline = time.monotonic() + seconds
        while (found := _marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


def _marked(mark: str) -> list[str]:
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if mark.encode() in environment.read_bytes():
                found.append(environment.parent.name)
    return found


def losses(run: Path) -> list[float]:
    """All of a run: of its steps and their sub-networks, and of validation."""
    found = []
    for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        found += [row["loss"], *row["subnetwork_losses"]] if row["event"] == "train" else list(row["losses"].values())
    return found


def last_of_ours(lines: list[str]) -> str:
    """The last line that is not torchrun's."""
    return [line for line in lines if re.match("(flextron|elastic): ", line)][-1]


@dataclass
class Runs:
    """Starts training runs on one small model; `whole` is the run without a fault."""

    folder: Path
    keys: list[str]
    jobs: list[Job] = field(default_factory=list)

    @property
    def whole(self) -> Path:
        return self.folder / "whole"

    def command(self, out: str) -> list[str]:
        return ["elastic", *self.keys, f"out={self.folder}/{out}"]

    def start(self, out: str, ranks: int, fault: str = "", torchrun: bool = False) -> Job:
        """ranks: plain processes with the environment that srun's would have, or those that torchrun starts."""
        mark = f"JOB={uuid.uuid4()}"
        env = {k: v for k, v in os.environ.items() if k not in LAUNCH}
        env |= {"OMP_NUM_THREADS": "1", "FAULT": fault, "JOB": mark.removeprefix("JOB=")}
        module = ["tests.parallel.faulty" if fault else "flextron_mcore", *self.command(out)]
        if torchrun:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
            places: list[dict[str, str]] = [{}]
        else:
            command = [sys.executable, "-m"]
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            values = [(str(rank), str(ranks), str(rank), "127.0.0.1", port) for rank in range(ranks)]
            places = [dict(zip(LAUNCH, v, strict=True)) for v in values] if ranks > 1 else [{}]
        processes = [
            subprocess.Popen(
                [*command, *module],
                env=env | place,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for place in places
        ]
        self.jobs.append(Job(self.folder / out, processes, mark))
        return self.jobs[-1]

    def assert_continues(self, out: str) -> None:
        """The same command, here in one process, gives the losses of the run without a fault."""
        stage(*self.command(out))
        self.assert_equal(out)

    def assert_equal(self, out: str) -> None:
        expected, found = losses(self.whole), losses(self.folder / out)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("faults")
    stage("prepare", f"input=[{text}/code,{text}/prose]", "vocab_size=300", "valid_fraction=0.2", f"out={folder}/data")
    arch = toy.config(vocab_size=300)
    space = ElasticSpace.build(arch, granularity=1, heads=[0.5, 1.0], ffn_hidden_size=[0.5, 1.0])
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), folder / "start")
    keys = [
        f"checkpoint={folder}/start",
        f"data={folder}/data",
        "model.micro_batch_size=2",
        "model.global_batch_size=4",
        f"trainer.max_steps={STEPS}",
        "trainer.val_check_interval=4",
        "trainer.limit_val_batches=1",
        "model.optim.sched.warmup_steps=0",
        f"exp_manager.checkpoint_callback_params.every_n_train_steps={SAVE_EVERY}",
    ]
    found = Runs(folder, keys)
    try:
        found.start("stopped", ranks=2, fault="4:1:stop")  # the longest: it runs beside the other tests
        stage(*found.command("whole"))
        yield found
    finally:
        for job in found.jobs:
            for pid in _marked(job.mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def names(job: Job) -> list[str]:
    return [path.name for path in list_checkpoints(job.out)]


def test_a_killed_rank_ends_the_job_which_then_continues(runs):
    job = runs.start("killed", ranks=2, fault="7:1:kill", torchrun=True)
    codes, lines = job.finish()
    assert codes == [1] and not job.left_behind()
    assert re.fullmatch(rf"flextron: failed: rank 1 of 2 \(host {socket.gethostname()}, pid \d+\) died", last_of_ours(lines))
    assert sum("flextron: " in line for line in lines) == 1
    assert f"iter_{SAVE_EVERY:07}" in names(job) and not (job.out / "metrics.json").exists()
    again = runs.start("killed", ranks=2, torchrun=True)
    codes, lines = again.finish()
    assert codes == [0], lines
    assert any(line.startswith("elastic: continuing after step ") for line in lines)
    runs.assert_equal("killed")


@pytest.mark.parametrize("fault", ["4:all:terminate", "4:1:terminate"])
def test_all_ranks_stop_after_the_same_step(runs, fault):
    out = fault.replace(":", "-")
    job = runs.start(out, ranks=2, fault=fault)
    codes, lines = job.finish()
    assert codes == [75, 75], lines
    line = "elastic: stopped by SIGTERM after step 5; its checkpoint is written: run the same command again to continue"
    assert last_of_ours(lines) == line and lines.count(line) == 1
    assert names(job)[-1] == "iter_0000005" and not job.left_behind()
    runs.assert_continues(out)


def test_torchrun_passes_the_signal_on(runs):
    job = runs.start("launcher", ranks=2, fault="4:0:terminate_launcher", torchrun=True)
    codes, lines = job.finish()
    assert codes == [1]  # torchrun's own, whatever its workers' are
    assert last_of_ours(lines).startswith("elastic: stopped by SIGTERM after step 5; its checkpoint is written")
    assert names(job)[-1] == "iter_0000005" and not job.left_behind()
    runs.assert_continues("launcher")


def test_a_signal_to_the_whole_group_does_not_break_the_save(runs):
    """The helpers that write get it too, and everyone gets it many times."""
    job = runs.start("group", ranks=1, fault="1:all:signal_group")
    codes, lines = job.finish()
    assert codes == [75], lines
    assert last_of_ours(lines).startswith("elastic: stopped by SIGUSR1 after step 2; its checkpoint is written")
    assert names(job) == ["iter_0000002"] and not job.left_behind()
    runs.assert_continues("group")


def test_before_training_a_signal_ends_the_process(runs):
    job = runs.start("early", ranks=1, fault="start:all:terminate")
    codes, lines = job.finish()
    assert codes == [128 + signal.SIGTERM] and last_of_ours(lines) == "flextron: stopped by SIGTERM"
    assert not names(job) and not job.left_behind()
    runs.assert_continues("early")


def test_an_error_of_one_rank_ends_all_with_its_line(runs):
    job = runs.start("error", ranks=2, fault="4:1:fail")
    codes, lines = job.finish()
    assert codes == [2, 2] and not job.left_behind()
    assert [line for line in lines if "flextron: " in line or "Error" in line] == ["flextron: error: rank 1: wires crossed"]


def test_a_stopped_rank_ends_the_job(runs):
    (job,) = (job for job in runs.jobs if job.out.name == "stopped")
    codes, lines = job.finish()
    assert codes == [1, -signal.SIGKILL] and not job.left_behind()
    pattern = r"flextron: failed: rank 1 of 2 \(.*, pid \d+\) was stopped for \d+ s, and was killed"
    assert re.fullmatch(pattern, last_of_ours(lines))
    runs.assert_continues("stopped")


def test_a_full_disk_ends_all_ranks_with_one_line(runs, make_disk):
    """There is room for the first checkpoint and not for the second."""
    disk = make_disk("1m")
    (disk / "run").mkdir()
    (runs.folder / "full").symlink_to(disk / "run")
    job = runs.start("full", ranks=2)
    codes, lines = job.finish()
    assert codes == [2, 2] and not job.left_behind(), lines
    ours = [line for line in lines if "flextron: " in line]
    assert len(ours) == 1 and re.search("cannot be written: (No space left|.* GiB needed)", ours[0])
    assert names(job) == [f"iter_{SAVE_EVERY:07}"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    runs.assert_continues("full")
