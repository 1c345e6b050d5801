"""examples/slurm/elastic.sbatch as it stands, on two nodes with two ranks each."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.slurm.cluster import FINAL, Cluster
from tests.stages.conftest import stage

ROOT = Path(__file__).resolve().parents[2]
STEPS = 100  # so many that the signal comes before the last one


@dataclass
class Start:
    """Keys of a training run, and the directory of that run by one process."""

    keys: list[str]
    run: Path


@pytest.fixture(scope="module")
def start(tmp_path_factory, text) -> Start:
    folder = tmp_path_factory.mktemp("start")
    stage("prepare", f"input=[{text}/code]", "vocab_size=300", "valid_fraction=0.2", f"out={folder}/data")
    arch = toy.config(num_layers=2, vocab_size=300)
    space = ElasticSpace.build(arch)
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), folder / "sorted")
    keys = [f"checkpoint={folder}/sorted", f"data={folder}/data", "model.micro_batch_size=2", "model.global_batch_size=8"]
    keys += [f"trainer.max_steps={STEPS}", "trainer.val_check_interval=50", "trainer.limit_val_batches=1"]
    keys += ["exp_manager.create_tensorboard_logger=false", "exp_manager.checkpoint_callback_params.every_n_train_steps=100"]
    stage("elastic", *keys, f"out={folder}/one")
    return Start(keys, folder / "one")


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def submit(slurm: Cluster, folder: Path, keys: list[str], *options: str, **variables: str) -> int:
    """Submit the script, with sizes for this cluster and `folder` as working directory, and return the job's number."""
    size = ["--nodes=2", "--account=flextron", "--time=10", f"--chdir={folder}", f"--output={folder}/job.log"]
    environment = {"VENV": sys.prefix, "RANKS_PER_NODE": "2", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **variables}
    return slurm.submit(*size, *options, ROOT / "examples" / "slurm" / "elastic.sbatch", *keys, **environment)


def same_run(run: Path, one: Path) -> None:
    expected, found = rows(one), rows(run)
    assert [(row["event"], row["step"]) for row in found] == [(row["event"], row["step"]) for row in expected]
    for row, other in zip(expected, found, strict=True):
        for key in ("loss", "subnetwork_losses", "losses"):
            if key in row:
                assert other[key] == pytest.approx(row[key], rel=1e-5), (key, row["step"])
    assert json.loads((run / "metrics.json").read_text())["steps"] == STEPS and open_checkpoint(run).step == STEPS


def test_training_that_is_stopped_is_queued_again_and_is_the_same_run(slurm, start, tmp_path):
    """The test sends the signal of the script's --signal, to save time. No step is lost or done twice."""
    run, log = tmp_path / "run", tmp_path / "job.log"
    job = submit(slurm, tmp_path, [*start.keys, f"out={run}"])
    trains = lambda shown: shown["JobState"] in FINAL or '"step": 2,' in _read(run / "log.jsonl")  # noqa: E731
    assert slurm.wait_for(job, trains)["JobState"] == "RUNNING", _read(log)
    slurm.run("scancel", "--signal=TERM", str(job))
    ended = slurm.wait_for(job, lambda shown: shown["JobState"] in FINAL and shown["Restarts"] == "1")
    assert ended["JobState"] == "COMPLETED", _read(log)
    assert f"training was stopped; job {job} is queued again" in _read(log) and "continuing after step" in _read(log)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    same_run(run, start.run)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_in_a_container_and_training_that_fails_is_not_queued_again(slurm, start, tmp_path):
    """The ranks refuse a complete run, which proves that they see it where the container mounts it."""
    shutil.copytree(start.run, tmp_path / "one")
    inside = f"/mnt/{tmp_path.name}"
    variables = {"CONTAINER": "flextron.sqsh", "CONTAINER_MOUNTS": f"{tmp_path}:{inside},{ROOT}:{ROOT}", "VENV": "/nowhere"}
    variables |= {"PATH": f"{sys.prefix}/bin:{slurm.environment['PATH']}"}  # python3 of these tests stands for the image's
    try:
        job = submit(slurm, tmp_path, [*start.keys, f"out={inside}/one"], RANKS_PER_NODE="1", **variables)
        assert slurm.wait(job) == "FAILED" and slurm.show(job)["Restarts"] == "0", _read(tmp_path / "job.log")
        assert _read(tmp_path / "job.log").count(f"{inside}/one: this run is complete") == 1
    finally:
        Path(inside).rmdir()  # empty, because the mount existed in the tasks only


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""
