"""Trainings that are interrupted over and over end like an undisturbed one. Run with FLEXTRON_FAULTS set; some minutes each."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time

import psutil
import pytest

from flextron_mcore.launch.follow import read_record
from tests.slurm.cluster import FINAL, Cluster
from tests.slurm.launched import continued, launch, pretraining, running_pretrain, steps_lost

pytestmark = pytest.mark.skipif("FLEXTRON_FAULTS" not in os.environ, reason="takes minutes: set FLEXTRON_FAULTS=1")


def test_preempted_three_times_at_random_moments(slurm, prepared, undisturbed, tmp_path):
    code, out, err = launch(slurm, tmp_path, *pretraining(prepared), "detach=true")
    assert code == 0, out + err
    job, moments = running_pretrain(slurm, tmp_path / "smoke"), random.Random(27)
    for time_ in range(3):
        runs = lambda shown: shown["JobState"] in ("RUNNING", *FINAL)  # noqa: E731
        assert slurm.wait_for(job, runs, timeout=240)["JobState"] == "RUNNING"
        # Also while the job starts: an idle machine trains all steps in half a minute.
        time.sleep(moments.uniform(0, 10))
        urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/{time_}", "--wrap=true")
        assert slurm.wait(urgent) == "COMPLETED"
    shown = slurm.wait_for(job, lambda shown: shown["JobState"] in FINAL, timeout=600)
    assert shown["JobState"] == "COMPLETED" and shown["Restarts"] == "3"
    continued(tmp_path / "smoke", undisturbed)
    print(f"three preemptions: steps lost {steps_lost(tmp_path / 'smoke')}")
    assert max(steps_lost(tmp_path / "smoke")) <= 1


def test_a_preemption_that_cancels(slurm, prepared, undisturbed, tmp_path):
    """With PreemptMode=CANCEL, Slurm would end the job and those that depend on it, but the job's script queues it again."""
    config = slurm.folder / "slurm.conf"
    before = config.read_text()
    config.write_text(before.replace("State=UP PriorityTier=1", "State=UP PriorityTier=1 PreemptMode=CANCEL"))
    slurm.run("scontrol", "reconfigure")
    try:
        code, out, err = launch(slurm, tmp_path, *pretraining(prepared), "detach=true")
        assert code == 0, out + err
        job = running_pretrain(slurm, tmp_path / "smoke")
        urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent", "--wrap=true")
        assert slurm.wait(urgent) == "COMPLETED"
        shown = slurm.wait_for(job, lambda shown: shown["JobState"] in FINAL, timeout=600)
    finally:
        config.write_text(before)
        slurm.run("scontrol", "reconfigure")
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1")
    continued(tmp_path / "smoke", undisturbed)
    print(f"a preemption that cancels: steps lost {steps_lost(tmp_path / 'smoke')}")


def end_node(slurm: Cluster, node: str) -> None:
    """Kill everything on a node of the cluster: its daemon, its jobs' steps, and their processes."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            variables = process.environ()
            if not variables.get("SLURM_CONF", "").startswith(f"{slurm.folder}/"):
                continue
            if variables.get("SLURMD_NODENAME") == node:
                found |= {process, *(parent for parent in process.parents() if "slurmstepd" in parent.name())}
            elif process.name() == "slurmd" and process.cmdline()[-1] == node:
                found.add(process)
    assert any(process.name() == "slurmd" for process in found) and len(found) > 3
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()


def test_a_node_that_is_lost_in_a_step(slurm, prepared, undisturbed, tmp_path):
    """Slurm queues the job of a node that does not answer again, and its training continues on the other one."""
    config = slurm.folder / "slurm.conf"
    before = config.read_text()
    config.write_text(before.replace("SlurmdTimeout=300", "SlurmdTimeout=20"))
    slurm.run("scontrol", "reconfigure")
    code, out, err = launch(slurm, tmp_path, *pretraining(prepared), "detach=true")
    assert code == 0, out + err
    job = running_pretrain(slurm, tmp_path / "smoke")
    node = slurm.show(job)["NodeList"]
    end_node(slurm, node)
    try:
        shown = slurm.wait_for(job, lambda shown: shown["JobState"] in FINAL, timeout=600)
    finally:
        config.write_text(before)
        subprocess.Popen(["slurmd", "-D", "-N", node], env=slurm.environment, start_new_session=True)
        slurm.run("scontrol", "reconfigure")
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1") and shown["NodeList"] != node
    continued(tmp_path / "smoke", undisturbed)
    print(f"a lost node: steps lost {steps_lost(tmp_path / 'smoke')}")


def test_many_jobs_of_a_minute(slurm, prepared, undisturbed, tmp_path):
    """Each job ends itself in time, and the next one continues."""
    code, out, err = launch(slurm, tmp_path, *pretraining(prepared), "run.time_limit=00:01:00", "run.stop_before=00:00:20")
    assert code == 0, out + err
    shown = slurm.show(int(read_record(tmp_path / "smoke")[-1].id))
    assert shown["JobState"] == "COMPLETED" and int(shown["Restarts"]) >= 1
    continued(tmp_path / "smoke", undisturbed)
    assert max(steps_lost(tmp_path / "smoke")) == 0
    print(f"jobs of a minute: {int(shown['Restarts']) + 1}")


def test_a_time_limit_in_the_midst_of_a_step(slurm, prepared, tmp_path):
    """A step takes most of a job. Slurm ends the job within one; the step is dropped, and the next job continues."""
    keys = ["cluster=slurm", "stages=[pretrain]", "gpus=2", f"data={prepared}", "pretrain.trainer.max_steps=4"]
    keys += ["pretrain.model.global_batch_size=2048", "pretrain.trainer.val_at_start=false", "run.stop_before=00:00:01"]
    keys += ["run.retries=10"]  # on a busy machine, a job may end without a checkpoint
    minutes = 60
    for name in ("long", "short"):
        code, out, err = launch(slurm, tmp_path / name, *keys, f"run.time_limit={minutes}:00", timeout=3000)
        assert code == 0, out + err
        rows = map(json.loads, (tmp_path / name / "smoke" / "pretrain" / "log.jsonl").read_text().splitlines())
        # Long enough for the start of a job and one step, on a busy machine too.
        minutes = 1 + int(1.5 * max(row.get("step_seconds", 0) for row in rows) // 60)
    continued(tmp_path / "short" / "smoke", tmp_path / "long" / "smoke")
    shown = slurm.show(int(read_record(tmp_path / "short" / "smoke")[-1].id))
    print(f"jobs of a minute, with long steps: {int(shown['Restarts']) + 1}")
