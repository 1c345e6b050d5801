"""State of jobs, read from results, logs and a stand-in for squeue. tests/slurm has the real Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.launch import follow
from flextron_mcore.launch.follow import Record
from flextron_mcore.settings.compose import compose
from flextron_mcore.stages import status


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch) -> Path:
    """File whose content a stand-in for squeue prints."""
    answer, tools = tmp_path / "queue.txt", tmp_path / "bin"
    tools.mkdir()
    (tools / "squeue").write_text(f"#!/bin/sh\ncat {answer}\n")
    (tools / "squeue").chmod(0o755)
    (tools / "sacct").write_text(f"#!/bin/sh\ncat {tmp_path}/accounts.txt\n")  # fails without that file
    (tools / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return answer


def record(tmp_path: Path, name: str, number: int, steps: int | None = None) -> Record:
    logs = tmp_path / "logs" / name
    logs.mkdir(parents=True, exist_ok=True)
    return Record(name, name, str(number), str(logs), steps)


def test_the_state_of_a_job_follows_from_result_log_and_slurm(tmp_path, squeue):
    results = tmp_path / "results"
    records = [record(tmp_path, "import", 1), record(tmp_path, "elastic", 2, 50), record(tmp_path, "router", 3, 20)]
    (results / "import").mkdir(parents=True)
    (results / "import" / "metrics.json").write_text("{}")
    (results / "elastic").mkdir()
    rows = [{"event": "train", "step": 7, "loss": 3.25}, {"event": "validation", "step": 7, "losses": {}}]
    (results / "elastic" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "tr')
    squeue.write_text("2|RUNNING|0:09|node1|None\n3|PENDING|0:00||Resources\n99|RUNNING|0:01|node1|None\n")
    found = follow.states(results, records)
    assert [(s.state, s.progress, s.alive) for s in found] == [
        ("COMPLETE", "", False),
        ("RUNNING", "step 7/50  loss 3.25", True),
        ("PENDING", "", True),
    ]
    # an ended job without a result is not complete, whatever Slurm says, and also if Slurm has forgotten it
    squeue.write_text("2|FAILED|0:09|node1|NonZeroExitCode\n")
    (tmp_path / "logs/elastic/log-x_2_0.out").write_text("[rank0]: a\n[default0]:flextron: failed: ValueError: no\nbye\n")
    found = follow.states(results, records)
    assert [(s.state, s.error) for s in found][1:] == [("FAILED", "flextron: failed: ValueError: no"), ("ENDED", "")]


def test_the_accounting_says_what_the_queue_has_forgotten(tmp_path, squeue):
    results = tmp_path / "results"
    records = [record(tmp_path, "import", 1), record(tmp_path, "elastic", 2, 50), record(tmp_path, "router", 3, 20)]
    squeue.write_text("")
    (tmp_path / "accounts.txt").write_text(
        "1|FAILED|00:00:09|2:0|node1|None\n"
        "2|PREEMPTED|01:00:00|0:15|node[1-2]|None\n2|TIMEOUT|1-00:00:00|0:0|node[3-4]|None\n"
        "3|CANCELLED by 0|00:00:00|0:0|None assigned|Dependency\n77|FAILED|0|0|x|None\n"
    )
    (tmp_path / "logs/import/log-x_1_0.out").write_text("flextron: error: hf=x: no such directory\n")
    found = follow.states(results, records)
    assert [(state.state, state.account.restarts) for state in found] == [("FAILED", 0), ("TIMEOUT", 1), ("CANCELLED", 0)]
    assert follow.state_rows(found) == [
        ["import", "1", "failed", "00:00:09", "0", "node1", "flextron: error: hf=x: no such directory; exit code 2:0"],
        ["elastic", "2", "timeout", "1-00:00:00", "1", "node[3-4]", ""],
        ["router", "3", "cancelled", "00:00:00", "0", "", "Dependency"],
    ]


def test_the_queue_says_why_a_job_waits(tmp_path, squeue):
    """squeue's reason is shown, because the accounting is late: it still has a hold that was released."""
    (job,) = records = [record(tmp_path, "elastic", 1, 50)]
    (tmp_path / "accounts.txt").write_text(
        "1|REQUEUED|00:00:58|0:0|node1|None\n1|PENDING|00:00:00|0:0|None assigned|JobHeldAdmin\n"
    )
    squeue.write_text("1|PENDING|0:00||Nodes required for job are DOWN, DRAINED or reserved\n")
    (Path(job.logs) / "log-x_1_0.out").write_text("flextron: failed: rank 1 of 2 died\n")
    (row,) = follow.state_rows(follow.states(tmp_path, records))
    said = "before: flextron: failed: rank 1 of 2 died; Nodes required for job are DOWN, DRAINED or reserved"
    assert row == ["elastic", "1", "pending", "00:00:00", "1", "", said]
    # a cluster without accounting
    (tmp_path / "accounts.txt").unlink()
    squeue.write_text("1|RUNNING|1-02:03:04|node[1-2]|None\n")
    (row,) = follow.state_rows(follow.states(tmp_path, records))
    assert row == ["elastic", "1", "running", "1-02:03:04", "", "node[1-2]", "before: flextron: failed: rank 1 of 2 died"]


def test_a_job_that_left_no_result_is_said(tmp_path, squeue):
    records = [record(tmp_path, "import", 1), record(tmp_path, "elastic", 2, 50)]
    squeue.write_text("1|COMPLETED|0:09|node1|None\n")
    rows = follow.state_rows(follow.states(tmp_path, records))
    assert [(row[2], row[-1]) for row in rows] == [
        ("completed", "without a result in its directory"),
        ("ended", "without a result; Slurm no longer knows the job"),
    ]


def test_time_left_is_that_of_the_last_steps(tmp_path, squeue):
    training = Record("elastic", "elastic", "2", str(tmp_path), 100, 1_000_000, 8)
    (tmp_path / "elastic").mkdir()
    rows = [{"event": "train", "step": i + 1, "loss": 2.0, "tokens_per_second": 50_000 if i else 1} for i in range(10)]
    (tmp_path / "elastic" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    squeue.write_text("2|RUNNING|0:09|node1|None\n")
    (state,) = follow.states(tmp_path, [training])
    # 90 steps of a million tokens at 50,000 tokens a second
    assert state.progress == "step 10/100  loss 2  10 M tokens  0.50 h and 4.00 rank hours left"


def test_time_left_after_a_rampup_counts_samples(tmp_path, squeue):
    """100 steps of 10,000 samples together, of which the first 10 had 100."""
    training = Record("elastic", "elastic", "2", str(tmp_path), 100, 100_000, 8, 10_000)
    (tmp_path / "elastic").mkdir()
    row = {"event": "train", "step": 10, "loss": 2.0, "tokens_per_second": 50_000, "consumed_samples": 100}
    (tmp_path / "elastic" / "log.jsonl").write_text(json.dumps(row) + "\n")
    squeue.write_text("2|RUNNING|0:09|node1|None\n")
    (state,) = follow.states(tmp_path, [training])
    # 9,900 samples of 1,000 tokens at 50,000 tokens a second
    assert state.progress == "step 10/100  loss 2  100000 tokens  0.06 h and 0.44 rank hours left"


def test_following_ends_when_nothing_is_alive(tmp_path, squeue):
    results = tmp_path / "results"
    records = [record(tmp_path, "import", 1), record(tmp_path, "elastic", 2, 50)]
    squeue.write_text("1|RUNNING|0:01|node1|None\n2|PENDING|0:00||Dependency\n")
    said = []

    def say(line: str) -> None:
        said.append(line.split())
        if len(said) == 2:
            squeue.write_text("1|FAILED|0:02|node1|NonZeroExitCode\n2|CANCELLED|0:00||Dependency\n")

    found = follow.follow(results, records, say, interval=0.05)
    assert [s.state for s in found] == ["FAILED", "CANCELLED"]
    assert said == [["import", "running"], ["elastic", "pending"], ["import", "failed"], ["elastic", "cancelled"]]


def test_following_waits_for_a_silent_slurm(tmp_path, squeue, monkeypatch):
    monkeypatch.setattr(follow, "QUESTIONS", 1)
    records, said = [record(tmp_path, "import", 1)], []
    tool = tmp_path / "bin" / "squeue"
    tool.write_text("#!/bin/sh\necho the controller is away >&2\nexit 1\n")

    def say(line: str) -> None:
        said.append(line)
        tool.write_text("#!/bin/sh\necho '1|FAILED|0:02|node1|None'\n")

    assert [state.state for state in follow.follow(tmp_path, records, say, interval=0.01)] == ["FAILED"]
    assert said == ["squeue: the controller is away; asking again", "import         failed"]
    tool.write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(follow, "PATIENCE", 0.05)
    with pytest.raises(FlextronError, match="squeue: exit code 1: try again when Slurm answers"):
        follow.follow(tmp_path, records, lambda line: None, interval=0.01)


def test_the_status_without_slurm_is_that_of_results_and_accounting(tmp_path, squeue, monkeypatch, capsys):
    monkeypatch.setattr(follow, "WAIT", 0.5)
    results = tmp_path / "results"
    for name in ("launch", "import"):
        (results / name).mkdir(parents=True)
    records = [record(tmp_path, "import", 1), record(tmp_path, "elastic", 2, 50), record(tmp_path, "router", 3)]
    follow.write_record(results, records)
    (results / "import" / "metrics.json").write_text("{}")
    (tmp_path / "accounts.txt").write_text("2|RUNNING|00:00:58|0:0|node1|None\n")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    found = status.run(compose("status", [f"run={results}"]))["jobs"]
    assert found == {"import": "COMPLETE", "elastic": "RUNNING", "router": "UNKNOWN"}
    assert capsys.readouterr().out.startswith("squeue: no answer within 0.5 s; without it:")


def test_the_newest_log_speaks(tmp_path):
    import os

    one = record(tmp_path, "elastic", 5)
    folder = Path(one.logs)
    for i, (name, text) in enumerate(
        {
            "log-a_5_0.out": "flextron: error: old\n",
            "log-a_5_1.out": "flextron: failed: new\n",
            "sbatch_a_5.out": "later\n",
        }.items()
    ):
        (folder / name).write_text(text)
        os.utime(folder / name, (i, i))
    assert follow.last_error(one) == "flextron: failed: new"
    assert [path.name for path in follow.log_files(one)] == ["log-a_5_1.out", "log-a_5_0.out", "sbatch_a_5.out"]


def test_the_record_is_read_back(tmp_path):
    results = tmp_path / "results"
    (results / "launch").mkdir(parents=True)
    records = [record(tmp_path, "import", 1), record(tmp_path, "elastic", 2, 50)]
    follow.write_record(results, records)
    assert follow.read_record(results) == records
    (results / follow.RECORD).write_text("{")
    with pytest.raises(FlextronError, match="jobs.json: cannot be read"):
        follow.read_record(results)
    with pytest.raises(FlextronError, match="nothing was launched to Slurm"):
        follow.read_record(tmp_path)


def test_results_that_were_moved_keep_their_logs(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    logs = old / follow.JOBS / "elastic"
    logs.mkdir(parents=True)
    (logs / "log-elastic_5_0.out").write_text("flextron: failed: no\n")
    follow.write_record(old, [Record("elastic", "elastic", "5", str(logs), 50)])
    old.rename(new)
    assert [follow.last_error(record) for record in follow.read_record(new)] == ["flextron: failed: no"]
    (tmp_path / "file").touch()
    with pytest.raises(
        FlextronError, match="jobs.json: cannot be read .*: set run= to a directory of a launch that you may read"
    ):
        follow.read_record(tmp_path / "file")


def test_variables_of_the_user_do_not_change_squeue(tmp_path, squeue, monkeypatch):
    tool = tmp_path / "bin" / "squeue"
    tool.write_text('#!/bin/sh\n[ -n "$SQUEUE_STATES" ] || echo "1|RUNNING|0:01|node1|None"\n')
    monkeypatch.setenv("SQUEUE_STATES", "PD")
    assert follow.queue(["1"])["1"].state == "RUNNING"


def test_a_log_that_is_not_there_yet_is_said(tmp_path):
    results = tmp_path / "results"
    (results / "launch").mkdir(parents=True)
    follow.write_record(results, [record(tmp_path, "elastic", 2, 50)])
    with pytest.raises(FlextronError, match="logs=elastic: nothing was logged yet in .*: try again when the job runs"):
        status.run(compose("status", [f"run={results}", "logs=elastic"]))


def test_a_slurm_that_does_not_answer_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FlextronError, match="squeue: not found"):
        follow.queue(["1"])
    (tmp_path / "squeue").write_text("#!/bin/sh\necho the controller is away >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: None)
    with pytest.raises(FlextronError, match="squeue: the controller is away"):
        follow.queue(["1"])
