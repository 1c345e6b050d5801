"""The operator's command on a real Slurm: two nodes, two ranks each, bare and in stand-ins of containers; and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flextron_mcore.launch.follow import read_record
from tests.slurm.cluster import FINAL, Cluster

ROOT = Path(__file__).resolve().parents[2]
STEPS = 300  # of a training that is interrupted: enough that it is not over before
STAGES = ["prepare", "pretrain", "importance", "elastic", "latency", "router", "joint", "evaluate"]
STAGES += ["export_0.8_parameters", "report"]


def flextron(slurm: Cluster, stage: str, *arguments: str, timeout: float = 1200) -> tuple[int, str, str]:
    """Exit code, standard output and error of a command on the login node."""
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
    """`flextron launch` of the smoke model on this cluster, followed to its end."""
    keys = ["cluster.account=flextron", "cluster.gpus_per_node=2", "cluster.exclusive=false", "cluster.mem=null", "model=smoke"]
    keys += [f"base_results_dir={base}", "detach=false", "env_vars={GLOO_SOCKET_IFNAME: lo, OMP_NUM_THREADS: 1}"]
    return flextron(slurm, "launch", *keys, *arguments, timeout=timeout)


@pytest.fixture(scope="module")
def bare(slurm, tmp_path_factory) -> Path:
    """The results of the whole chain without containers."""
    base = tmp_path_factory.mktemp("bare")
    code, out, err = launch(slurm, base, "cluster=slurm")
    assert code == 0, out + err
    return base / "smoke"


def check_chain(results: Path) -> None:
    metrics = {name: json.loads((results / name / "metrics.json").read_text()) for name in STAGES}
    assert metrics["elastic"]["validation"]["last"]["full"] < 7
    assert metrics["pretrain"]["steps"] == 30 and metrics["joint"]["steps"] == 5
    assert list((results / "export_0.8_parameters").glob("*.safetensors")) and (results / "report" / "index.html").is_file()


def test_the_whole_chain(slurm, bare):
    check_chain(bare)
    records = read_record(bare)
    assert [record.name for record in records] == STAGES
    shown = slurm.show(int(records[3].id))
    assert shown["JobState"] == "COMPLETED" and shown["NumNodes"] == "2" and shown["JobName"] == "flextron.elastic"
    trainer = OmegaConf.load(bare / "elastic" / "config.yaml").trainer
    assert (trainer.num_nodes, trainer.devices) == (2, 2)  # a stage refuses any other number of processes
    log = next(Path(records[3].logs).glob("log-*.out")).read_text()
    assert "step 20/20" in log


def test_what_is_complete_is_not_submitted_again(slurm, bare):
    code, out, err = launch(slurm, bare.parent, "cluster=slurm", timeout=120)
    assert code == 0 and out.count(": complete in ") == len(STAGES) and "nothing is left to do" in out, out + err


def test_status_and_logs(slurm, bare):
    code, out, _ = flextron(slurm, "status", f"run={bare}")
    assert code == 0 and out.count(" complete ") == len(STAGES) and "step 20/20" in out, out
    code, out, _ = flextron(slurm, "status", f"run={bare}", "logs=elastic", "lines=5")
    assert code == 0 and len(out.splitlines()) == 6 and Path(out.splitlines()[0]).is_file()
    code, _, err = flextron(slurm, "status", f"run={bare}", "logs=elastik")
    assert code == 2 and "logs=elastik: no such job (did you mean 'elastic'?)" in err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_the_whole_chain_in_containers(slurm, tmp_path):
    """A job with pyxis' options runs. The stand-in mounts what it is asked to and has no image: PATH stands for what is in it."""
    code, out, err = launch(
        slurm,
        tmp_path,
        "cluster=bcm",
        "container=nvcr.io#nvidia/pytorch:25.09-py3",
        f"container_mounts=['{ROOT}:{ROOT}']",
        f"env_vars.PATH={sys.prefix}/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    )
    assert code == 0, out + err
    check_chain(tmp_path / "smoke")
    script = next((tmp_path / "smoke/launch/jobs/experiments").rglob("*elastic_sbatch.sh")).read_text()
    assert "--container-image nvcr.io#nvidia/pytorch:25.09-py3" in script and f"{tmp_path}/smoke:{tmp_path}/smoke" in script


def test_a_stage_that_fails_ends_the_chain(slurm, bare, tmp_path):
    code, out, err = launch(
        slurm,
        tmp_path,
        "cluster=slurm",
        "stages=[pretrain,importance,elastic]",
        "gpus=2",
        f"data={bare}/prepare",
        "pretrain.data_weights={nothing: 1}",
    )
    assert code == 1, out + err
    assert "data_weights" in err and err.startswith("flextron: failed: ") and len(err.strip().splitlines()) == 1
    states = {record.name: slurm.show(int(record.id))["JobState"] for record in read_record(tmp_path / "smoke")}
    assert states == {"pretrain": "FAILED", "importance": "CANCELLED", "elastic": "CANCELLED"}
    assert slurm.show(int(read_record(tmp_path / "smoke")[0].id))["Restarts"] == "0"


def running_pretrain(slurm: Cluster, results: Path) -> int:
    """The job of a pretraining that was launched, when it has trained for some steps."""
    job = int(read_record(results)[0].id)
    log = results / "pretrain" / "log.jsonl"
    trains = lambda shown: shown["JobState"] in FINAL or (log.exists() and '"step": 12,' in log.read_text())  # noqa: E731
    assert slurm.wait_for(job, trains, timeout=240)["JobState"] == "RUNNING"
    return job


def continued(results: Path) -> None:
    """Every step once, in several goes."""
    rows = [json.loads(line) for line in (results / "pretrain" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == list(range(1, STEPS + 1))
    logs = sorted(Path(read_record(results)[0].logs).glob("log-*.out"), key=lambda path: path.stat().st_mtime)
    printed = logs[-1].read_text()
    assert "continuing after step" in printed and "continuing after step 0" not in printed


def pretraining(bare: Path) -> list[str]:
    return ["cluster=slurm", "stages=[pretrain]", "gpus=2", f"data={bare}/prepare", f"pretrain.trainer.max_steps={STEPS}"]


def test_a_cancelled_run_continues_when_it_is_launched_again(slurm, bare, tmp_path):
    keys = pretraining(bare)
    code, out, err = launch(slurm, tmp_path, *keys, "detach=true")
    assert code == 0, out + err
    job = running_pretrain(slurm, tmp_path / "smoke")
    code, _, err = launch(slurm, tmp_path, *keys, timeout=120)
    assert code == 2 and f"pretrain: job {job} of an earlier launch is running" in err
    slurm.run("scancel", str(job))
    assert slurm.wait(job) == "CANCELLED" and slurm.show(job)["Restarts"] == "0"
    code, out, err = launch(slurm, tmp_path, *keys)
    assert code == 0, out + err
    assert int(read_record(tmp_path / "smoke")[0].id) != job
    continued(tmp_path / "smoke")


def test_a_preempted_run_continues_by_itself(slurm, bare, tmp_path):
    """A job of a partition of higher priority takes the nodes; Slurm ends the training and queues it again."""
    code, out, err = launch(slurm, tmp_path, *pretraining(bare), "detach=true")
    assert code == 0, out + err
    job = running_pretrain(slurm, tmp_path / "smoke")
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=true")
    assert slurm.wait(urgent) == "COMPLETED"
    assert slurm.wait_for(job, lambda shown: shown["JobState"] == "COMPLETED", timeout=240)["Restarts"] == "1"
    continued(tmp_path / "smoke")


def test_a_stage_that_runs_out_of_time_continues_in_its_next_job(slurm, bare, tmp_path):
    """A second of training a job: each stops after one step, with a checkpoint, and is queued again."""
    code, out, err = launch(
        slurm,
        tmp_path,
        "cluster=slurm",
        "stages=[pretrain,importance]",
        "gpus=2",
        f"data={bare}/prepare",
        "pretrain.trainer.max_steps=2",
        "pretrain.trainer.max_time=00:00:00:01",
    )
    assert code == 0, out + err
    first, second = (slurm.show(int(record.id)) for record in read_record(tmp_path / "smoke"))
    assert first["JobState"] == "COMPLETED" and first["Restarts"] == "1"
    assert second["JobState"] == "COMPLETED" and second["Restarts"] == "0"
    logs = sorted(Path(read_record(tmp_path / "smoke")[0].logs).glob("log-*.out"))
    assert [path.stem.rpartition("_")[2] for path in logs] == ["0", "1"]
    assert "stopped by trainer.max_time after step 1" in logs[0].read_text()
    assert "continuing after step 1" in logs[1].read_text()
