"""State of jobs, from the results, a stand-in for squeue, and logs. With the real Slurm: tests/slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.launch import follow
from flextron_mcore.launch.follow import Record


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch) -> Path:
    """A file whose content squeue answers with."""
    answer, tools = tmp_path / "queue.txt", tmp_path / "bin"
    tools.mkdir()
    (tools / "squeue").write_text(f"#!/bin/sh\ncat {answer}\n")
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return answer


def record(tmp_path: Path, name: str, number: int, steps: int | None = None) -> Record:
    logs = tmp_path / "logs" / name
    logs.mkdir(parents=True, exist_ok=True)
    return Record(name, name, str(number), str(logs), steps)


def test_states(tmp_path, squeue):
    results = tmp_path / "results"
    records = [record(tmp_path, "import", 1), record(tmp_path, "elastic", 2, 50), record(tmp_path, "router", 3, 20)]
    (results / "import").mkdir(parents=True)
    (results / "import" / "metrics.json").write_text("{}")
    (results / "elastic").mkdir()
    rows = [{"event": "train", "step": 7, "loss": 3.25}, {"event": "validation", "step": 7, "losses": {}}]
    (results / "elastic" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "tr')
    squeue.write_text("2 RUNNING\n3 PENDING\n99 RUNNING\n")
    found = follow.states(results, records)
    assert [(s.state, s.progress, s.alive) for s in found] == [
        ("COMPLETE", "", False),
        ("RUNNING", "step 7/50  loss 3.25", True),
        ("PENDING", "", True),
    ]
    # the job is over, and its result is not there: whatever Slurm says or forgot, it is not complete
    squeue.write_text("2 FAILED\n")
    (tmp_path / "logs/elastic/log-x_2_0.out").write_text("[rank0]: a\n[default0]:flextron: failed: ValueError: no\nbye\n")
    found = follow.states(results, records)
    assert [(s.state, s.error) for s in found][1:] == [("FAILED", "flextron: failed: ValueError: no"), ("ENDED", "")]


def test_following_ends_when_nothing_is_alive(tmp_path, squeue):
    results = tmp_path / "results"
    records = [record(tmp_path, "import", 1), record(tmp_path, "elastic", 2, 50)]
    squeue.write_text("1 RUNNING\n2 PENDING\n")
    said = []

    def say(line: str) -> None:
        said.append(line.split())
        if len(said) == 2:
            squeue.write_text("1 FAILED\n2 CANCELLED\n")

    found = follow.follow(results, records, say, interval=0.05)
    assert [s.state for s in found] == ["FAILED", "CANCELLED"]
    assert said == [["import", "running"], ["elastic", "pending"], ["import", "failed"], ["elastic", "cancelled"]]


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
    follow.write_record(results, "x", records)
    assert follow.read_record(results) == records
    (results / follow.RECORD).write_text("{")
    with pytest.raises(FlextronError, match="jobs.json: cannot be read"):
        follow.read_record(results)
    with pytest.raises(FlextronError, match="nothing was launched to Slurm"):
        follow.read_record(tmp_path)


def test_a_slurm_that_does_not_answer_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FlextronError, match="squeue: not found"):
        follow.slurm_states(["1"])
