"""A rank, or torchrun, killed, stopped or terminated in a training, a save, an evaluation and an export on two ranks.

`make faults` tries every combination; without it a sample runs.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.faults.harness import contents, empty
from tests.parallel.jobs import Job, start
from tests.stages.conftest import stage

PATIENCE = 10  # FLEXTRON_RANK_TIMEOUT
STAGES = {"5": "elastic", "save": "elastic", "evaluate": "evaluate", "export": "export"}
FAULTS = {
    "0:kill": r"rank 0 of 2 \(.*\) died",
    "1:kill": r"rank 1 of 2 \(.*\) died",
    "0:stop": rf"rank 0 of 2 \(.*\) was stopped for {PATIENCE} s, and was killed",
    "1:stop": rf"rank 1 of 2 \(.*\) was stopped for {PATIENCE} s, and was killed",
    "0:terminate": "stopped by SIGTERM.*",
    "1:terminate": "stopped by SIGTERM.*",
    "0:kill_launcher": "torchrun on .* died, or its machine did",
    "0:stop_launcher": rf"torchrun \(pid \d+\) was stopped for {PATIENCE} s, and was killed",
    "0:terminate_launcher": "stopped by SIGTERM.*",
}
SAMPLE = [("save", "0:kill")]
ALL = [(moment, fault) for moment in STAGES for fault in FAULTS]


class Ranks:
    """Runs each command on two tensor-parallel ranks, undisturbed once and then with faults."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.whole: dict[str, dict[str, bytes]] = {}
        self.jobs: list[Job] = []

    def run(self, name: str, fault: str = "") -> tuple[int, list[str]]:
        """Run a command to its end: torchrun's exit code, and the lines of the ranks. No process of it is left."""
        checkpoint, data = f"checkpoint={self.folder}/start", f"data={self.folder}/data"
        training = ["model.micro_batch_size=2", "model.global_batch_size=4", "trainer.max_steps=8", "trainer.limit_val_batches=1"]
        saving = "exp_manager.checkpoint_callback_params.every_n_train_steps=3"
        argv = {
            "elastic": [data, *training, saving, "exp_manager.create_tensorboard_logger=false"],
            "evaluate": [data, "limit_val_batches=2"],
            "export": ["verify=false"],
        }[name]
        argv = [name, checkpoint, *argv, "model.tensor_model_parallel_size=2", f"out={self.work}/out"]
        job = start(argv, self.work, 2, fault, torchrun=True, patience=str(PATIENCE))
        self.jobs.append(job)
        (code,), lines = job.finish()
        assert not job.left_behind()
        return code, [line for line in lines if re.match(r"flextron: |\w+: stopped by", line)]

    def undisturbed(self, name: str) -> dict[str, bytes]:
        """Files that a command leaves."""
        if name not in self.whole:
            empty(self.work)
            assert self.run(name)[0] == 0
            self.whole[name] = contents(self.work)
        return self.whole[name]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, text) -> Iterator[Ranks]:
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    stage("prepare", f"input=[{text}/prose]", "vocab_size=300", "valid_fraction=0.2", f"out={made.folder}/data")
    arch = toy.config(vocab_size=300)
    space = ElasticSpace.build(arch, granularity=2, heads=[0.5, 1.0], ffn_hidden_size=[0.5, 1.0])
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), made.folder / "start")
    yield made
    for job in made.jobs:
        job.kill()


@pytest.mark.parametrize("moment, fault", ALL if os.environ.get("FLEXTRON_FAULTS") else SAMPLE)
def test_the_job_ends_soon_with_a_line_and_the_command_typed_again_gives_the_same_bytes(ranks, moment, fault):
    name = STAGES[moment]
    expected = ranks.undisturbed(name)
    empty(ranks.work)
    begun = time.monotonic()
    code, lines = ranks.run(name, f"{moment}:{fault}")
    seconds = time.monotonic() - begun
    assert code != 0 and seconds < 180, (code, seconds, lines)
    assert len(lines) == 1 and re.fullmatch(rf"(flextron: failed|flextron|elastic): {FAULTS[fault]}", lines[0]), lines
    out = ranks.work / "out"
    assert not (out / "metrics.json").exists() and (name == "elastic" or not out.exists())
    code, lines = ranks.run(name)
    assert code == 0, lines
    found = contents(ranks.work)
    assert not sorted(file for file in expected.keys() | found.keys() if expected.get(file) != found.get(file))
