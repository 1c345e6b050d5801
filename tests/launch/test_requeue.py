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
    # Prints nothing if SQUEUE_STATES is set, as squeue might, and fails as often as the number in the file `away`.
    "squeue": """if [ -n "$SQUEUE_STATES" ]; then exit; fi
read -r n < "$FAKE/away"
if [ "$n" -gt 0 ]; then echo $((n - 1)) > "$FAKE/away"; echo "Unable to contact slurm controller" >&2; exit 1; fi
case $* in *State*) cat "$FAKE/state" 2>/dev/null || echo "RUNNING 2999-12-31T00:00:00 N/A None" ;; *) echo "(null)" ;; esac""",
    "scontrol": 'case "$1 $2" in "show config") echo "KillWait                = 5 sec" ;; show*) echo "$3" | tr , "\\n" ;; '
    '*) echo "$*" >> "$FAKE/asked" ;; esac',
    "sinfo": 'cat "$FAKE/nodes"',
}
DIED = "flextron: failed: rank 3 of 8 (host node2, pid 77) died"
AWAY = "asking again until Slurm answers: Unable to contact slurm controller\n"
STEP = "[default0]:pretrain: step 1/30, 3 s left  loss 5.1"


@pytest.fixture
def job(launch, tmp_path) -> Job:
    config = launch("cluster=slurm", "cluster.account=a", "model=smoke", "stages=[pretrain,export]", "export.budget=0.8")
    planned = plan(config)
    (planned.results / "launch").mkdir(parents=True)
    (tmp_path / "nodes").write_text("node1\nnode2\nnode3\n")
    (tmp_path / "away").write_text("0\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in PROGRAMS.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    return planned.jobs[0]


@pytest.fixture
def ended(job, tmp_path) -> Callable[..., list[str]]:
    """Function that runs a job's script, and returns what the script asked of scontrol.

    The function takes lines of the job's log, its exit code and the shell code of its command.
    """
    restarts = iter(range(100))

    def end(*said: str, code: int = 1, does: str = "true", of: Job = job, ends: int | None = None, **more: str) -> list[str]:
        number, asked = next(restarts), tmp_path / "asked"
        asked.unlink(missing_ok=True)
        log = tmp_path / f"log-{of.name}_7_{number}.out"
        log.write_text("".join(f"{line}\n" for line in said))
        lines = requeue.lines(of, of.out.parent, tmp_path, [of.out / "metrics.json"])
        script = f"set +e\n{lines}\n{does}\nset -e\nexit {code}\n"
        slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(number), "SLURM_NNODES": "2", "SLURM_JOB_PARTITION": "batch"}
        environment = {**slurm, "FAKE": str(tmp_path), "PATH": f"{tmp_path}/tools:/usr/bin:/bin", **more}
        plain = ["env", "--default-signal=TERM", "bash", "-c", script]  # other tests may have left SIGTERM ignored
        done = subprocess.run(plain, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == (code if ends is None else ends) and not done.stderr.replace(AWAY, ""), done.stderr
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
    assert ended(STEP) == ["requeue 7"]  # a new launch counts failures from 0


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


def test_input_that_an_earlier_job_trained_with_is_tried_again(job, ended, tmp_path):
    missing = "flextron: error: data=/scratch/data: no such directory: set data= to the out of `flextron prepare`"
    assert ended(STEP, "flextron: failed: RuntimeError: NCCL error", does=saved(job, 1)) == ["requeue 7"]
    assert ended(missing) == ["requeue 7"]
    assert ended(missing) == []
    assert why(job, tmp_path).startswith("flextron: failed: not queued again, two jobs in a row ended without a step; the last")


def test_without_retries_a_failure_stands(job, ended, tmp_path):
    assert ended(STEP, DIED, of=replace(job, retries=0)) == []
    assert why(job, tmp_path) == DIED


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_job_that_slurm_is_ending_is_left_alone(ended, tmp_path, state):
    (tmp_path / "state").write_text(f"{state} 2026-11-30T04:41:44 N/A None\n")
    assert ended(STEP) == []


def test_a_job_that_was_preempted_and_that_slurm_would_not_queue_again(job, ended, launch, tmp_path):
    """With PreemptMode=CANCEL, Slurm does not queue a preempted job again. The script does, in every stage and every time."""
    (tmp_path / "state").write_text("COMPLETING 2026-11-30T04:41:44 2026-11-30T04:41:44 None\n")
    (other,) = plan(launch("cluster=slurm", "cluster.account=a", "model=smoke", "stages=[export]")).jobs
    assert [ended(of=of) for of in (job, other) for _ in range(job.retries + 2)] == [["requeue 7"]] * 10


def test_a_controller_that_is_away_for_a_while_is_asked_again(job, ended, tmp_path):
    """A stand-in for sleep takes no time, so that the script asks again at once."""
    (tmp_path / "tools" / "sleep").symlink_to("/bin/true")
    (tmp_path / "away").write_text("3\n")
    assert ended(STEP) == ["requeue 7"]
    (tmp_path / "tools" / "scontrol").write_text("#!/bin/sh\necho Access/permission denied >&2\nexit 1\n")
    with pytest.raises(AssertionError, match="^Access/permission denied\n"):  # the refusal is printed once, and not asked again
        ended(STEP)


def test_variables_of_the_users_shell_do_not_change_the_answers(ended):
    assert ended(STEP, SQUEUE_STATES="PD", SLURM_TIME_FORMAT="relative") == ["requeue 7"]


def test_a_job_whose_work_is_complete_succeeds(job, ended, tmp_path):
    """A rank may die after its work, or a node before Slurm notices the end. Run again, a stage would refuse its own result."""
    result = f"mkdir -p {shlex.quote(str(job.out))}; touch {shlex.quote(str(job.out))}/metrics.json"
    (tmp_path / "state").write_text("COMPLETING 2026-11-30T04:41:44 2026-11-30T04:41:44 None\n")
    assert ended(STEP, does=result, code=0) == ["requeue 7"]
    (tmp_path / "state").unlink()
    assert ended(STEP, DIED, does=result, ends=0) == []
    (tmp_path / "state").write_text("RUNNING 2026-11-30T04:41:44 N/A None\n")  # after its time limit, which Slurm calls a failure
    assert ended(STEP, does=result, code=0) == ["requeue 7"]
    (tmp_path / "state").unlink()
    assert ended(does="touch $FAKE/worked", ends=0) == [] and not (tmp_path / "worked").exists()


def test_a_launch_starts_the_count_of_failures_anew(job, ended):
    """A job without SLURM_RESTART_COUNT is the first of a launch, so failures of earlier launches do not count."""
    assert [ended(STEP) for _ in range(2)] == [["requeue 7"]] * 2
    assert [ended(STEP, SLURM_RESTART_COUNT=str(count)) for count in range(4)] == [*[["requeue 7"]] * 3, []]


def test_a_training_that_stopped_goes_on_and_one_that_is_done_does_not(job, ended):
    stopped = requeue.stopped(job, job.out.parent)
    for step in range(5):
        assert ended(STEP, code=1, does=f"touch {shlex.quote(str(stopped))}; {saved(job, step)}") == ["requeue 7"]
        assert not stopped.exists()
    assert ended(STEP, code=0) == []


def test_a_training_that_stops_without_a_new_checkpoint_is_given_up(job, ended, tmp_path):
    """A training is not queued for ever if its jobs have less time than a step and a save take."""
    does = f"touch {shlex.quote(str(requeue.stopped(job, job.out.parent)))}"
    assert [ended(STEP, does=does) for _ in range(4)] == [*[["requeue 7"]] * 3, []]
    assert "run.retries=3 were used up without a new checkpoint" in why(job, tmp_path)
    assert [ended(does=does) for _ in range(2)] == [["requeue 7"], []]
    assert "two jobs in a row ended without a step" in why(job, tmp_path)


@pytest.mark.parametrize("seconds", [-1, 3600])
@pytest.mark.parametrize("reason, again", [("TimeLimit", True), ("None", False)])
def test_a_training_that_slurm_ends_at_its_time_limit_goes_on(job, ended, tmp_path, launch, seconds, reason, again):
    """Slurm's reason decides, because the clock of the node may differ from the controller's."""
    (tmp_path / "state").write_text(f"COMPLETING 2026-11-30T04:41:44 N/A {reason}\n")
    ends = f"end=$(($(date +%s) + {seconds}))"
    assert bool(ended(STEP, does=f"{ends}; {saved(job, 1)}")) == again
    (other,) = plan(launch("cluster=slurm", "cluster.account=a", "model=smoke", "stages=[export]")).jobs
    assert ended(of=other, does=ends) == []  # it would start again from its beginning


def test_a_script_that_slurm_kills_has_queued_its_training_again(job, ended, tmp_path):
    """If processes outlive KillWait, Slurm kills the script before it sees their end."""
    (tmp_path / "state").write_text("COMPLETING 2026-11-30T04:41:44 N/A TimeLimit\n")
    watched = "end=$(date +%s); last_moment & watcher=$!"
    asked = lambda: ended(STEP, code=-9, does=f"{watched}; trap : TERM; sleep 4; kill -KILL $$")  # noqa: E731
    assert [asked() for _ in range(4)] == [*[["requeue 7"]] * 3, []]
    # A script that sees the end asks once, and its watcher ends with it.
    assert ended(STEP, does=f"{watched}; sleep 4") == ["requeue 7"]
    assert ended(STEP, does=f"end=$(($(date +%s) + 60)); {watched.partition('; ')[2]}; {saved(job, 1)}; end=1") == ["requeue 7"]
    (tmp_path / "state").unlink()
    assert ended(STEP, code=0, does=watched) == []


def test_a_preempted_script_that_slurm_kills_has_queued_its_training_again(job, ended, tmp_path):
    """The watcher of the script gets SIGTERM, too, long before the job's end."""
    (tmp_path / "state").write_text("COMPLETING 2026-11-30T04:41:44 2026-11-30T04:41:44 None\n")
    killed = "trap : TERM; last_moment & watcher=$!; sleep 1; kill -TERM $watcher; sleep 4; kill -KILL $$"
    assert [ended(STEP, code=-9, does=does) for does in (killed, f"end=$(($(date +%s) + 3600)); {killed}")] == [["requeue 7"]] * 2
    # The signal may also come before the watcher has set its trap.
    assert ended(STEP, code=-9, does=killed.replace("kill -TERM $watcher; ", "")) == ["requeue 7"]


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


@pytest.mark.parametrize(
    ("state", "refusal", "asked"),
    [
        ("RUNNING", "", ["requeue 7"]),
        ("CANCELLED", "", []),
        ("RUNNING", "Unable to contact slurm controller", ["requeue 7"] * 2),
        ("RUNNING", "Requested operation is presently disabled", ["requeue 7"]),
    ],
)
def test_the_example_script_asks_until_slurm_answers(tmp_path, state, refusal, asked):
    """examples/slurm/elastic.sbatch after a training that was stopped; squeue fails twice, and scontrol once."""
    programs = {
        "squeue": '[ -z "$SQUEUE_STATES" ] && echo x >> away && [ "$(wc -l < away)" -gt 2 ] && echo "$STATE"',
        "scontrol": 'case $1 in show) echo node1 ;; *) echo "$*" >> asked\n'
        'if [ "$(wc -l < asked)" -eq 1 ] && [ -n "$REFUSAL" ]; then echo "$REFUSAL" >&2; exit 1; fi ;; esac',
        "srun": 'case $* in *hostname*) echo 10.0.0.1 ;; *) touch "$FLEXTRON_STOPPED"; exit 3 ;; esac',
        "sleep": "",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1", "SLURM_CPUS_ON_NODE": "2"}
    environment = {**slurm, "PATH": f"{tmp_path}:/usr/bin:/bin", "STATE": state, "REFUSAL": refusal, "SQUEUE_STATES": "PD"}
    script = Path(__file__).resolve().parents[2] / "examples" / "slurm" / "elastic.sbatch"
    done = subprocess.run(["bash", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "asked").read_text().splitlines() == asked if asked else not (tmp_path / "asked").exists()
    assert list(tmp_path.glob(".elastic_stopped_*")) == []
