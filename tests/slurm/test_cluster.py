"""The test cluster behaves like Slurm: jobs, dependencies, requeueing, preemption, containers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm import cluster as cluster_module
from tests.slurm.cluster import Cluster


def script(folder: Path, *lines: str) -> Path:
    file = folder / "job.sbatch"
    file.write_text(
        "\n".join(("#!/bin/bash", f"#SBATCH --output={folder}/job_%j.log", "#SBATCH --open-mode=append", *lines)) + "\n"
    )
    return file


def log(folder: Path, job: int) -> str:
    return (folder / f"job_{job}.log").read_text()


def test_two_nodes_run_a_job(slurm, tmp_path):
    assert slurm.run("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %t").split() == [
        "node1",
        "idle",
        "node2",
        "idle",
    ]
    directives = ("#SBATCH --nodes=2 --ntasks-per-node=2 --gpus-per-node=8 --account=flextron --exclusive --mem=0",)
    job = slurm.submit(script(tmp_path, *directives, "srun bash -c 'echo \"$SLURMD_NODENAME $SLURM_PROCID $(pwd)\"'"))
    assert slurm.wait(job) == "COMPLETED", log(tmp_path, job)
    here = os.getcwd()
    assert sorted(log(tmp_path, job).splitlines()) == [f"node{1 + rank // 2} {rank} {here}" for rank in range(4)]
    deadline = time.monotonic() + 30
    while not (steps := {row["id"]: row["state"] for row in slurm.sacct(job)}).get(str(job), "RUNNING") == "COMPLETED":
        assert time.monotonic() < deadline, steps
        time.sleep(0.5)
    assert steps[f"{job}.0"] == "COMPLETED"


def test_exit_codes_and_what_depends_on_them(slurm, tmp_path):
    failing = slurm.submit("--hold", script(tmp_path, "srun bash -c 'exit 7'"))
    following = slurm.submit(f"--dependency=afterok:{failing}", "--kill-on-invalid-dep=yes", script(tmp_path, "echo ran"))
    waiting = {row["id"]: row["state"] for row in slurm.squeue()}
    assert waiting[str(failing)] == waiting[str(following)] == "PENDING"
    slurm.run("scontrol", "release", str(failing))
    assert slurm.wait(failing) == "FAILED" and slurm.show(failing)["ExitCode"] == "7:0"
    assert slurm.wait(following) == "CANCELLED"


def test_a_requeued_job_runs_again(slurm, tmp_path):
    lines = ("echo run ${SLURM_RESTART_COUNT:-0}", '[ -n "${SLURM_RESTART_COUNT:-}" ] || scontrol requeue "$SLURM_JOB_ID"')
    job = slurm.submit("--requeue", script(tmp_path, *lines))
    slurm.wait_for(job, lambda shown: shown["JobState"] == "COMPLETED" and shown["Restarts"] == "1")
    assert [line for line in log(tmp_path, job).splitlines() if line.startswith("run")] == ["run 0", "run 1"]


def test_an_urgent_job_takes_the_nodes(slurm, tmp_path):
    lines = ("#SBATCH --nodes=2 --exclusive --requeue", '[ -n "${SLURM_RESTART_COUNT:-}" ] || sleep 300', "echo ran")
    job = slurm.submit(script(tmp_path, *lines))
    slurm.wait_for(job, lambda shown: shown["JobState"] == "RUNNING")
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", script(tmp_path, "echo ran"))
    assert slurm.wait(urgent) == "COMPLETED"
    assert slurm.wait(job) == "COMPLETED" and slurm.show(job)["Restarts"] == "1"


def test_environment_is_without_ranks(slurm, monkeypatch):
    names = {"RANK", "MASTER_PORT", "SLURM_JOB_ID"}
    for name in names:
        monkeypatch.setenv(name, "1")
    assert not names & slurm.environment.keys()
    with pytest.raises(RuntimeError, match="ended with 1: .*Invalid job id"):
        slurm.run("scontrol", "show", "job", "999999")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_container_options_mount_and_enter(slurm, tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "file").write_text("seen\n")
    inside = f"/mnt/{tmp_path.name}"
    container = ["--container-image=nvcr.io#nvidia/pytorch:25.09-py3", "--no-container-mount-home", "--container-env=A,B"]
    container += [f"--container-mounts={tmp_path}/inside:{inside},{tmp_path}:{tmp_path}", f"--container-workdir={inside}"]
    try:
        said = slurm.run("srun", "--nodes=2", "--label", *container, "bash", "-c", "pwd; cat file; env | grep ^PYXIS | sort")
        for rank in ("0", "1"):
            lines = [line[3:] for line in said.splitlines() if line.startswith(rank)]
            assert lines == [
                inside,
                "seen",
                "PYXIS_STANDIN_ENV=A,B",
                "PYXIS_STANDIN_FLAGS=no-container-mount-home",
                "PYXIS_STANDIN_IMAGE=nvcr.io#nvidia/pytorch:25.09-py3",
                f"PYXIS_STANDIN_MOUNTS={tmp_path}/inside:{inside},{tmp_path}:{tmp_path}",
                f"PYXIS_STANDIN_WORKDIR={inside}",
            ]
        assert not list(Path(inside).iterdir())  # empty, because the mount existed in the task only
    finally:
        Path(inside).rmdir()
    with pytest.raises(RuntimeError, match="pyxis_standin: mount of /nowhere: No such file or directory"):
        slurm.run("srun", "--container-image=x", "--container-mounts=/nowhere:/mnt", "true")


def processes(folder: Path) -> dict[int, str]:
    """{id: command} of the processes that name the folder in their command or their environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            text = command + (process / "environ").read_bytes()
        except OSError:
            continue
        if f"{folder}/".encode() in text:
            found[int(process.name)] = command.replace(b"\0", b" ").decode(errors="replace")
    return found


def test_a_folder_with_too_long_a_name(tmp_path):
    """A folder with too long a name is refused: Slurm would hold its jobs with no other word than launch_failed."""
    folder = tmp_path / ("long" * 20)
    with pytest.raises(RuntimeError, match="letters too many for Slurm's sockets"), Cluster(folder):
        pass
    assert not folder.exists()


def test_a_second_cluster_and_its_end_when_the_tests_are_killed(slurm, tmp_path_factory):
    """Two clusters run beside each other. After kill -9 of the second's owner nothing of it is left, not even its running job."""
    second = tmp_path_factory.mktemp("second")
    code = f"""
from pathlib import Path
from {Cluster.__module__} import Cluster
with Cluster(Path({str(second)!r}), spank=False) as slurm:
    job = slurm.submit("--nodes=2", "--output=/dev/null", "--wrap=srun sleep 600")
    slurm.wait_for(job, lambda shown: shown["JobState"] == "RUNNING")
    print("running", flush=True)
    slurm.wait(job, timeout=600)
"""
    root = str(Path(cluster_module.__file__).parents[2])
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout and owner.stdout.readline() == "running\n"
        started = time.monotonic() + 60  # Slurm calls a job running before its step has processes
        while not any(command.split()[:1] == [shutil.which("sleep")] for command in processes(second).values()):
            assert time.monotonic() < started, processes(second)
            time.sleep(0.1)
        assert slurm.run("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N").split() == ["node1", "node2"]
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    deadline = time.monotonic() + 60
    while left := processes(second):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
