"""The benchmarks of tokens that choose still run: no time is looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import average_time, dispatch, equal_time, trained
from flextron_mcore.config import FlextronError
from tests.routing_toy import write_table
from tests.stages.conftest import TRAIN, stage

RUN = [*(key for key in TRAIN if "optim" not in key), "model.micro_batch_size=4", "model.global_batch_size=8"]


@pytest.fixture(scope="module")
def runs(chain, tmp_path_factory) -> Path:
    """A directory with static routers, and adaptive ones whose table counts routing."""
    run = tmp_path_factory.mktemp("benchmarks")
    table = write_table(chain / "elastic", run / "latency.json", routed=True)
    keys = [f"data={chain}/data", f"latency={table}", *RUN, "trainer.max_steps=4"]
    stage("router", f"checkpoint={chain}/elastic", *keys, "candidate_samples=0", f"out={run}/static")
    adaptive = ["kind=adaptive", "targets_per_step=2", "adaptive.calibration_samples=8", "validation_targets=[0.9]"]
    stage("router", f"checkpoint={run}/static", *keys, *adaptive, f"out={run}/adaptive")
    return run


def printed(capsys, name: str) -> list[list[str]]:
    """The cells of each row of the table `name`."""
    text = capsys.readouterr().out
    assert f"\n{name}" in text
    return [[cell.strip() for cell in line.strip("│\n").split("│")] for line in text.splitlines() if line.startswith("│")]


def test_average_time(chain, runs, monkeypatch, capsys):
    shares = sorted(share for _, share in json.loads((runs / "adaptive" / "metrics.json").read_text())["calibration"])
    middle = round(shares[len(shares) // 2], 3)
    monkeypatch.setattr(average_time, "BUDGETS", (0.01, middle))
    average_time._run(str(chain / "data"), str(runs / "adaptive"), passes=1, rounds=2)
    (row,) = printed(capsys, "average_time")  # the other budget is not reached
    assert row[:3] == ["adaptive", "full", f"{middle:g}"] and 0 < float(row[3]) < 2
    with pytest.raises(FlextronError, match="no latency table of a prefill that counts routing"):
        average_time._run(str(chain / "data"), str(chain / "elastic"))
    with pytest.raises(FlextronError, match="rounds=1: quartiles want at least 2"):
        average_time._run(str(chain / "data"), str(runs / "adaptive"), rounds=1)
    with pytest.raises(FlextronError, match="static: .*its routers are static"):
        average_time._run(str(chain / "data"), str(runs / "static"))


def test_equal_time(chain, runs, monkeypatch, capsys):
    for name, value in {"TARGETS": (0.9,), "LADDER": [0.95, 1.0], "BATCH": 2}.items():
        monkeypatch.setattr(equal_time, name, value)
    numbers = ["sequences=1", "samples=4", "rounds=2"]
    monkeypatch.setattr("sys.argv", ["equal_time", str(runs / "static"), str(chain / "data"), str(runs / "adaptive"), *numbers])
    trained.command(equal_time.__doc__, 3, equal_time._run)
    (row,) = printed(capsys, "equal_time")
    assert row[:3] == ["adaptive", "full", "0.9"]


@pytest.mark.parametrize(
    "arguments", [["a"], ["a", "b", "c", "round=3"], ["a", "b", "c", "rounds=-1"], ["a", "b", "c", "rounds=x"]]
)
def test_wrong_arguments(arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", ["equal_time", *arguments])
    with pytest.raises(SystemExit, match=r"python -m benchmarks.equal_time STATIC .* sequences=, samples=, rounds="):
        trained.command(equal_time.__doc__, 3, equal_time._run)


def test_numbers_are_passed_on(monkeypatch):
    got = []

    def run(*paths: str, rounds: int = 1, samples: int = 2) -> None:
        got.append((paths, rounds, samples))

    monkeypatch.setattr("sys.argv", ["name", "a", "rounds=7", "b"])
    trained.command("usage", 2, run)
    assert got == [(("a", "b"), 7, 2)]


def test_dispatch(monkeypatch, capsys):
    shape = dispatch.Shape(32, 4, 4, 2, 96)
    monkeypatch.setattr(dispatch, "SHAPES", (shape,))
    monkeypatch.setattr(dispatch, "GPU_SHAPES", (shape,))
    monkeypatch.setattr(dispatch, "ROUNDS", 2)
    dispatch.run()
    assert len(printed(capsys, "dispatch")) == 10
