"""Launch the smoke model on the tests' Slurm, interrupt its pretraining, and compare it with an undisturbed one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from flextron_mcore.checkpoint.store import list_checkpoints
from flextron_mcore.launch.follow import read_record
from tests.slurm.cluster import FINAL, Cluster

ROOT = Path(__file__).resolve().parents[2]
STEPS = 300  # enough that a training does not end before it is interrupted
BUDGETS = "budgets=[0.8 parameters,0.6 parameters]"


def flextron(slurm: Cluster, stage: str, *arguments: str, timeout: float = 1200) -> tuple[int, str, str]:
    """Run `flextron STAGE` as on the login node: (exit code, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "flextron_mcore", stage, *arguments],
        env=slurm.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr


def launch(slurm: Cluster, base: Path, *arguments: str, timeout: float = 1200) -> tuple[int, str, str]:
    """Run `flextron launch` of the smoke model, and follow it to its end: (exit code, standard output, standard error)."""
    keys = ["cluster.account=flextron", "cluster.gpus_per_node=2", "cluster.exclusive=false", "cluster.mem=null", "model=smoke"]
    keys += [f"base_results_dir={base}", "detach=false", "env_vars={GLOO_SOCKET_IFNAME: lo, OMP_NUM_THREADS: 1}"]
    return flextron(slurm, "launch", *keys, *arguments, timeout=timeout)


def running_pretrain(slurm: Cluster, results: Path) -> int:
    """Wait until the launched pretraining has trained for some steps and has a checkpoint, and return its job's number."""
    job = int(read_record(results)[-1].id)
    run = results / "pretrain"

    def trains(shown: dict[str, str]) -> bool:
        # The checkpoint of step 10 is written while the training continues.
        log = run / "log.jsonl"
        begun = log.exists() and '"step": 12,' in log.read_text() and bool(list_checkpoints(run))
        return shown["JobState"] in FINAL or begun

    assert slurm.wait_for(job, trains, timeout=240)["JobState"] == "RUNNING"
    return job


def losses(results: Path) -> list[tuple[int, float]]:
    """Step and loss of each step of the pretraining."""
    rows = map(json.loads, (results / "pretrain" / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if row["event"] == "train"]


def continued(results: Path, undisturbed: Path) -> None:
    """Assert that the log, which several processes wrote, has the losses of an undisturbed training to the last bit."""
    assert losses(results) == losses(undisturbed)
    logs = sorted(Path(read_record(results)[-1].logs).glob("log-*.out"), key=lambda path: path.stat().st_mtime)
    printed = logs[-1].read_text()
    assert "continuing after step" in printed and "continuing after step 0" not in printed


def pretraining(data: Path) -> list[str]:
    """Keys of a training of two ranks on prepared data."""
    printed = "pretrain.trainer.log_every_n_steps=1"  # `steps_lost` reads each step in the log
    return ["cluster=slurm", "stages=[pretrain]", "gpus=2", f"data={data}", f"pretrain.trainer.max_steps={STEPS}", printed]


def steps_lost(results: Path) -> list[int]:
    """Number of steps that were trained twice, for each interruption of the pretraining."""
    logs = sorted(Path(read_record(results)[-1].logs).glob("log-*.out"), key=lambda path: path.stat().st_mtime)
    # A job that was interrupted before its first step says nothing about the steps of others.
    texts = [text for log in logs if re.search(r"pretrain: (step|continuing after step) \d+", text := log.read_text())]
    last = [max((int(step) for step in re.findall(r"pretrain: step (\d+)/", text)), default=0) for text in texts]
    first = [int(found[1]) if (found := re.search(r"continuing after step (\d+)", text)) else 0 for text in texts]
    return [max(0, before - after) for before, after in zip(last, first[1:], strict=False)]
