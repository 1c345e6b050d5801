"""Killed, stopped and failing ranks, and signals: the job ends soon with one line, and the same command continues it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from flextron_mcore.checkpoint.store import CheckpointInfo, list_checkpoints
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.parallel.jobs import Job, last_of_ours, start
from tests.stages.conftest import stage

STEPS, SAVE_EVERY = 8, 3


def losses(run: Path) -> list[float]:
    """All losses in a run's log: of steps, of their sub-networks, and of validations."""
    found = []
    for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        found += [row["loss"], *row["subnetwork_losses"]] if row["event"] == "train" else list(row["losses"].values())
    return found


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
        """Start `flextron elastic` on `ranks` ranks, with srun's environment or by torchrun. fault: FAULT of faulty.py."""
        self.jobs.append(start(self.command(out), self.folder / out, ranks, fault, torchrun))
        return self.jobs[-1]

    def assert_continues(self, out: str) -> None:
        """Run the same command in this process; assert that the losses are those of the run without a fault."""
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
        stage(*found.command("whole"))
        yield found
    finally:
        for job in found.jobs:
            job.kill()


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


def test_all_ranks_stop_after_the_same_step(runs):
    """SIGTERM at one rank. At all ranks: test_torchrun_passes_the_signal_on."""
    job = runs.start("one-rank", ranks=2, fault="4:1:terminate")
    codes, lines = job.finish()
    assert codes == [75, 75], lines
    line = "elastic: stopped by SIGTERM after step 4; its checkpoint is written: run the same command again to continue"
    assert last_of_ours(lines) == line and lines.count(line) == 1
    assert names(job)[-1] == "iter_0000004" and not job.left_behind()
    runs.assert_continues("one-rank")


def test_torchrun_passes_the_signal_on(runs):
    job = runs.start("launcher", ranks=2, fault="4:0:terminate_launcher", torchrun=True)
    codes, lines = job.finish()
    assert codes == [1]  # torchrun's exit code hides those of its workers
    assert last_of_ours(lines).startswith("elastic: stopped by SIGTERM after step 4; its checkpoint is written")
    assert names(job)[-1] == "iter_0000004" and not job.left_behind()
    runs.assert_continues("launcher")


def test_a_signal_to_the_whole_group_does_not_break_the_save(runs):
    """Processes that write the checkpoint get the signal, too, and each process gets it many times."""
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


@pytest.mark.parametrize("ranks, at_once", [(1, True), (2, False)])
def test_a_killed_writer_of_a_checkpoint_ends_the_job(runs, ranks, at_once):
    """Megatron-Core would wait for ever for a writer that the kernel killed, such as for lack of memory."""
    out = f"writer-{ranks}-{at_once}"
    runs.keys.append(f"exp_manager.checkpoint_callback_params.async_save={not at_once}")
    try:
        job = runs.start(out, ranks, fault="writer:0:kill")
    finally:
        runs.keys.pop()
    codes, lines = job.finish()
    assert codes == [2] * ranks and not job.left_behind(), lines
    ours = [line for line in lines if "flextron: " in line]
    assert len(ours) == 1 and "a process that wrote the checkpoint was killed" in ours[0], lines
    assert not names(job)
    runs.assert_continues(out)


def test_a_stopped_rank_ends_the_job(runs):
    # No other job may run meanwhile: a killed child of this process would be taken for a writer of the run that continues here.
    job = runs.start("stopped", ranks=2, fault="4:1:stop")
    codes, lines = job.finish()
    assert codes == [1, -signal.SIGKILL] and not job.left_behind()
    pattern = r"flextron: failed: rank 1 of 2 \(.*, pid \d+\) was stopped for \d+ s, and was killed"
    assert re.fullmatch(pattern, last_of_ours(lines))
    runs.assert_continues("stopped")


def test_a_full_disk_ends_all_ranks_with_one_line(runs, make_disk):
    """The disk has room for the first checkpoint but not for the second."""
    disk = make_disk("1m")
    (disk / "run").mkdir()
    (runs.folder / "full").symlink_to(disk / "run")
    job = runs.start("full", ranks=2)
    codes, lines = job.finish()
    assert codes == [2, 2] and not job.left_behind(), lines
    ours = [line for line in lines if "flextron: " in line]
    assert len(ours) == 1 and re.search("cannot be written: (No space left|.* needed, .* free)", ours[0])
    assert names(job) == [f"iter_{SAVE_EVERY:07}"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    runs.assert_continues("full")
