"""`flextron launch` on a real Slurm of two nodes with two ranks each: without containers, in stand-ins of containers, failing."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import sys
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from flextron_mcore.launch.follow import read_record
from tests.slurm.cluster import FINAL, Cluster
from tests.slurm.launched import BUDGETS, ROOT, STEPS, continued, flextron, launch, pretraining, running_pretrain

STAGES = ["prepare", "pretrain", "importance", "elastic", "latency", "router", "joint", "evaluate"]
STAGES += ["export_0.8_parameters", "export_0.6_parameters", "report"]


def test_the_whole_chain(slurm, bare):
    metrics = {name: json.loads((bare / name / "metrics.json").read_text()) for name in STAGES}
    assert metrics["elastic"]["validation"]["last"]["full"] < 7
    assert metrics["pretrain"]["steps"] == 30 and metrics["joint"]["steps"] == 5
    assert list((bare / "export_0.8_parameters").glob("*.safetensors")) and (bare / "report" / "index.html").is_file()
    records = read_record(bare)
    assert [record.name for record in records] == STAGES
    assert len({record.id for record in records}) == len(STAGES) - 1  # both exports share a job
    shown = slurm.show(int(records[3].id))
    assert shown["JobState"] == "COMPLETED" and shown["NumNodes"] == "2" and shown["JobName"] == "elastic.smoke"
    trainer = OmegaConf.load(bare / "elastic" / "config.yaml").trainer
    assert (trainer.num_nodes, trainer.devices) == (2, 2)  # the stage checked that so many processes were started
    log = next(Path(records[3].logs).glob("log-*.out")).read_text()
    assert "step 20/20" in log


def test_complete_stages_are_not_submitted_again(slurm, bare):
    code, out, err = launch(slurm, bare.parent, "cluster=slurm", BUDGETS, timeout=120)
    assert code == 0 and out.count(": complete in ") == len(STAGES) and "nothing is left to do" in out, out + err


def test_status_and_logs(slurm, bare):
    code, out, _ = flextron(slurm, "status", f"run={bare}")
    assert code == 0 and out.count(" complete ") == len(STAGES) and "step 20/20" in out, out
    code, out, _ = flextron(slurm, "status", f"run={bare}", "logs=elastic", "lines=5")
    assert code == 0 and len(out.splitlines()) == 6 and Path(out.splitlines()[0]).is_file()
    code, _, err = flextron(slurm, "status", f"run={bare}", "logs=elastik")
    assert code == 2 and "logs=elastik: no such job (did you mean 'elastic'?)" in err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_chain_in_containers(slurm, tmp_path):
    """Jobs of one process and of four run with pyxis' options.

    The stand-in for pyxis mounts directories, but has no image: PATH finds this Python.
    """
    code, out, err = launch(
        slurm,
        tmp_path,
        "cluster=bcm",
        "stages=[prepare,pretrain]",
        "container=nvcr.io#nvidia/pytorch:25.09-py3",
        f"container_mounts=['{ROOT}:{ROOT}']",
        f"env_vars.PATH={sys.prefix}/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    )
    assert code == 0, out + err
    assert json.loads((tmp_path / "smoke/pretrain/metrics.json").read_text())["steps"] == 30
    script = (tmp_path / "smoke/launch/jobs/pretrain/pretrain_sbatch.sh").read_text()
    assert "--container-image 'nvcr.io#nvidia/pytorch:25.09-py3'" in script and f"{tmp_path}/smoke:{tmp_path}/smoke" in script


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


def test_a_cancelled_run_continues_when_it_is_launched_again(slurm, prepared, undisturbed, tmp_path):
    keys = pretraining(prepared)
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
    continued(tmp_path / "smoke", undisturbed)


def test_a_preempted_run_continues_by_itself(slurm, prepared, undisturbed, tmp_path):
    """A job of a partition with higher priority takes the nodes: Slurm stops the training and queues it again."""
    code, out, err = launch(slurm, tmp_path, *pretraining(prepared), "detach=true")
    assert code == 0, out + err
    job = running_pretrain(slurm, tmp_path / "smoke")
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=true")
    assert slurm.wait(urgent) == "COMPLETED"
    assert slurm.wait_for(job, lambda shown: shown["JobState"] == "COMPLETED", timeout=240)["Restarts"] == "1"
    continued(tmp_path / "smoke", undisturbed)


def kill_rank(results: Path, rank: int) -> None:
    """Kill a rank of the pretraining by SIGKILL, a stand-in for a broken GPU."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"{results}/launch/pretrain.yaml" in process.cmdline() and process.environ().get("RANK") == str(rank):
                process.kill()


def test_a_training_that_loses_a_rank_continues_on_another_node(slurm, undisturbed, tmp_path):
    keys = ["cluster=slurm", "stages=[prepare,pretrain]", "gpus=2", f"pretrain.trainer.max_steps={STEPS}", "detach=true"]
    code, out, err = launch(slurm, tmp_path, *keys)
    assert code == 0, out + err
    job = running_pretrain(slurm, tmp_path / "smoke")
    node = slurm.show(job)["NodeList"]
    kill_rank(tmp_path / "smoke", 1)
    shown = slurm.wait_for(job, lambda shown: shown["JobState"] in FINAL, timeout=240)
    assert (shown["JobState"], shown["Restarts"], shown["ExcNodeList"]) == ("COMPLETED", "1", node)
    assert shown["NodeList"] not in (node, "(null)")
    continued(tmp_path / "smoke", undisturbed)


def test_a_stage_that_runs_out_of_time_continues_in_its_next_job(slurm, bare, tmp_path):
    """Each job may train for one second: it stops after one step with a checkpoint, and is queued again."""
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


def test_a_training_whose_image_took_long_stops_before_the_end_of_its_job(slurm, bare, tmp_path):
    """The limit is 10 s after the job's start. `setup` stands for an image that takes longer than that."""
    keys = ["stages=[pretrain]", "gpus=2", f"data={bare}/prepare", "pretrain.trainer.max_steps=2", "cluster.setup=sleep 11"]
    code, out, err = launch(slurm, tmp_path, "cluster=slurm", *keys, "run.time_limit=00:05:00", "run.stop_before=00:04:50")
    assert code == 0, out + err
    assert slurm.show(int(read_record(tmp_path / "smoke")[0].id))["Restarts"] == "1"
    logs = sorted(Path(read_record(tmp_path / "smoke")[0].logs).glob("log-*.out"))
    assert "stopped by the end of its job (run.time_limit) after step 1" in logs[0].read_text()


# Keys of jobs that Slurm holds, so that nothing of them runs.
HELD = ["cluster=slurm", "stages=[prepare,pretrain]", "detach=true", "cluster.job_name_prefix=held-"]
COMMENT = 'it\'s $(touch X); `touch X` \\"two\\" #3 é'
HELD += [f'cluster.additional_parameters={{comment: "{COMMENT}", hold: true}}', "env_vars.Odd=a b;$(touch X)"]


def held(slurm: Cluster) -> list[str]:
    """Numbers of the held jobs in the queue."""
    rows = slurm.run("squeue", "--noheader", "--format=%i %j").split("\n")
    return [row.split()[0] for row in rows if " held-" in row]


def test_slurm_gets_what_a_dry_run_prints(slurm, tmp_path):
    """A job that jobs.json lacks is found at Slurm, too, because Slurm keeps its script."""
    code, printed, err = launch(slurm, tmp_path / "a b", *HELD, "dry_run=true")
    assert code == 0 and not (tmp_path / "a b").exists(), err
    code, out, err = launch(slurm, tmp_path / "a b", *HELD)
    assert code == 0, out + err
    jobs = held(slurm)
    try:
        scripts = [part.partition("\n")[2].rstrip("\n") for part in printed.partition("estimates;")[0].split("# ---- ")[1:]]
        assert [slurm.run("scontrol", "write", "batch_script", job, "-").rstrip("\n") for job in sorted(jobs, key=int)] == scripts
        comments = slurm.run("squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%k").splitlines()
        assert comments == [COMMENT.replace("\\", "")] * 2
        assert {row.split()[1] for row in slurm.run("squeue", "--noheader", "--format=%i %j").splitlines()} >= {
            "held-prepare.smoke",
            "held-pretrain.smoke",
        }
        (tmp_path / "a b" / "smoke" / "launch" / "jobs.json").unlink()
        code, _, err = launch(slurm, tmp_path / "a b", *HELD)
        assert code == 2 and "of an earlier launch is pending: wait for its end, or cancel it with `scancel" in err, err
        assert held(slurm) == jobs
    finally:
        slurm.run("scancel", *jobs)


def test_of_two_launches_at_once_one_submits(slurm, tmp_path):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        ended = list(pool.map(lambda _: launch(slurm, tmp_path, *HELD), range(2)))
    jobs = held(slurm)
    slurm.run("scancel", *jobs)
    assert sorted(code for code, _, _ in ended) == [0, 2] and len(jobs) == 2, ended
    refused = next(err for code, _, err in ended if code == 2)
    assert "is writing to it" in refused or "of an earlier launch is pending" in refused
