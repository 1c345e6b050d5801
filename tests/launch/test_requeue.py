"""Shell code that queues a job again, run by bash with stand-ins for Slurm's programs."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flextron_mcore.launch import requeue
from flextron_mcore.launch.follow import Record, last_error
from flextron_mcore.launch.plan import Job, plan

PROGRAMS = {
    "squeue": 'case $* in *%T*) cat "$FAKE/state" 2>/dev/null || echo RUNNING ;; *) echo "(null)" ;; esac',
    "scontrol": 'case "$1 $2" in "show config") echo "KillWait                = 5 sec" ;; show*) echo "$3" | tr , "\\n" ;; '
    '*) echo "$*" >> "$FAKE/asked" ;; esac',
    "sinfo": 'cat "$FAKE/nodes"',
}
DIED = "flextron: failed: rank 3 of 8 (host node2, pid 77) died"
STEP = "[default0]:pretrain: step 1/30, 3 s left  loss 5.1"


@pytest.fixture
def job(launch, tmp_path) -> Job:
    config = launch("cluster=slurm", "cluster.account=a", "model=smoke", "stages=[pretrain,export]", "export.budget=0.8")
    planned = plan(config)
    (planned.results / "launch").mkdir(parents=True)
    (tmp_path / "nodes").write_text("node1\nnode2\nnode3\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in PROGRAMS.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    return planned.jobs[0]


@pytest.fixture
def ended(job, tmp_path) -> Callable[..., list[str]]:
    """Function from lines of a job's log, its exit code and its command to the requests that its script makes of scontrol."""
    restarts = iter(range(100))

    def end(*said: str, code: int = 1, does: str = "true", of: Job = job) -> list[str]:
        number, asked = next(restarts), tmp_path / "asked"
        asked.unlink(missing_ok=True)
        log = tmp_path / f"log-{of.name}_7_{number}.out"
        log.write_text("".join(f"{line}\n" for line in said))
        lines = requeue.lines(of, of.out.parent, tmp_path)
        script = f"set +e\n{lines}\n{does}\nset -e\nexit {code}\n"
        slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(number), "SLURM_NNODES": "2", "SLURM_JOB_PARTITION": "batch"}
        environment = {**slurm, "FAKE": str(tmp_path), "PATH": f"{tmp_path}/tools:/usr/bin:/bin"}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code and not done.stderr, done.stderr
        return asked.read_text().splitlines() if asked.exists() else []

    return end


def why(job: Job, folder: Path) -> str:
    return last_error(Record(job.name, job.stage, "7", str(folder), 30))


def saved(job: Job, step: int) -> str:
    return f"mkdir -p {shlex.quote(str(job.out))}/checkpoints/iter_{step:07d}"


def test_a_job_is_queued_again_until_its_retries_are_used_up(job, ended, tmp_path):
    for _ in range(job.retries):
        assert ended(STEP, "flextron: failed: RuntimeError: NCCL error") == ["requeue 7"]
    assert ended(STEP, "flextron: failed: RuntimeError: NCCL error") == []
    assert why(job, tmp_path) == (
        "flextron: failed: not queued again, run.retries=3 were used up without a new checkpoint; the last job said: "
        "RuntimeError: NCCL error"
    )
    assert ended(STEP) == ["requeue 7"]  # launched again


def test_a_new_checkpoint_starts_the_count_anew(job, ended):
    for step in range(1, 8):
        assert ended(STEP, does=saved(job, step)) == ["requeue 7"]
    assert [ended(STEP) for _ in range(3)] == [["requeue 7"], ["requeue 7"], []]


def test_two_jobs_in_a_row_without_a_step_are_enough(job, ended, tmp_path):
    assert ended() == ["requeue 7"]
    assert ended(STEP, does=saved(job, 1)) == ["requeue 7"]
    assert ended() == ["requeue 7"]
    assert ended(code=9) == []
    assert why(job, tmp_path) == (
        "flextron: failed: not queued again, two jobs in a row ended without a step; the last job said: exit code 9"
    )


def test_a_stage_without_steps_has_all_its_retries(job, ended, launch):
    config = launch("cluster=slurm", "cluster.account=a", "model=smoke", "stages=[export]", "export.run.retries=2")
    (other,) = plan(config).jobs
    assert [ended(of=other) for _ in range(3)] == [["requeue 7"], ["requeue 7"], []]


@pytest.mark.parametrize(
    "said, again",
    [
        ("flextron: error: elastic: model.seq_length=5000 is more than the model's 4096 positions: lower it", False),
        ("flextron: error: run: a process that wrote the checkpoint was killed; run the same command again", True),
    ],
)
def test_refused_input_is_not_tried_again(job, ended, tmp_path, said, again):
    assert bool(ended(said, code=2)) == again
    assert why(job, tmp_path) == said


def test_without_retries_a_failure_stands(job, ended, tmp_path):
    assert ended(STEP, DIED, of=replace(job, retries=0)) == []
    assert why(job, tmp_path) == DIED


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_job_that_slurm_is_ending_is_left_alone(ended, tmp_path, state):
    (tmp_path / "state").write_text(f"{state}\n")
    assert ended(STEP) == []


def test_a_training_that_stopped_goes_on_and_one_that_is_done_does_not(job, ended):
    stopped = requeue.stopped(job, job.out.parent)
    for step in range(5):
        assert ended(STEP, code=1, does=f"touch {shlex.quote(str(stopped))}; {saved(job, step)}") == ["requeue 7"]
        assert not stopped.exists()
    assert ended(STEP, code=0) == []


def test_a_training_that_stops_without_a_new_checkpoint_is_given_up(job, ended, tmp_path):
    """A step and a save that take longer than a job may, for example."""
    does = f"touch {shlex.quote(str(requeue.stopped(job, job.out.parent)))}"
    assert [ended(STEP, does=does) for _ in range(4)] == [*[["requeue 7"]] * 3, []]
    assert "run.retries=3 were used up without a new checkpoint" in why(job, tmp_path)
    assert [ended(does=does) for _ in range(2)] == [["requeue 7"], []]
    assert "two jobs in a row ended without a step" in why(job, tmp_path)


@pytest.mark.parametrize("seconds, again", [(-1, True), (3600, False)])
def test_a_training_that_slurm_ends_at_its_time_limit_goes_on(job, ended, tmp_path, launch, seconds, again):
    (tmp_path / "state").write_text("COMPLETING\n")
    ends = f"end=$(($(date +%s) + {seconds}))"
    assert bool(ended(STEP, does=f"{ends}; {saved(job, 1)}")) == again
    (other,) = plan(launch("cluster=slurm", "cluster.account=a", "model=smoke", "stages=[export]")).jobs
    assert ended(of=other, does=ends) == []  # it would start again from its beginning


def test_a_script_that_slurm_kills_has_queued_its_training_again(job, ended, tmp_path):
    """Processes that outlive KillWait: the script is killed before it can see their end."""
    (tmp_path / "state").write_text("COMPLETING\n")
    watched = "end=$(date +%s); last_moment & watcher=$!"
    asked = lambda: ended(STEP, code=-9, does=f"{watched}; trap : TERM; sleep 4; kill -KILL $$")  # noqa: E731
    assert [asked() for _ in range(4)] == [*[["requeue 7"]] * 3, []]
    # A script that sees the end asks once, and its watcher ends with it.
    assert ended(STEP, does=f"{watched}; sleep 4") == ["requeue 7"]
    assert ended(STEP, does=f"end=$(($(date +%s) + 60)); {watched.partition('; ')[2]}; {saved(job, 1)}; end=1") == ["requeue 7"]
    assert ended(STEP, code=0, does=watched) == []


def test_the_node_of_a_dead_rank_is_excluded_where_enough_are_left(job, ended, tmp_path):
    assert ended(STEP, DIED) == ["requeue 7", "update JobId=7 ExcNodeList=node2"]
    assert ended(STEP, DIED, of=replace(job, cluster=replace(job.cluster, nodelist="node[1-2]"))) == ["requeue 7"]
    (tmp_path / "nodes").write_text("node1\nnode2\n")
    assert ended(STEP, DIED) == ["requeue 7"]


def test_paths_of_any_kind_are_quoted(job, ended):
    odd = replace(job, settings=replace(job.settings, out=str(job.out.parent / "it's $(touch X) é; b" / "pretrain")))
    (odd.out.parent / "launch").mkdir(parents=True)
    assert ended(STEP, of=odd, does=saved(odd, 3)) == ["requeue 7"]
    assert {path.name for path in odd.out.parent.iterdir()} == {"launch", "pretrain"}
