"""scripts/study_peers.py, which trains baselines, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.stages.conftest import stage


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_peers", Path(__file__).parents[2] / "scripts/study_peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_peers_train_with_the_familys_tokens(chain, tmp_path, monkeypatch, capsys):
    study = tmp_path / "study"
    study.mkdir()
    for name, source in {"data": "data", "imported": "parent", "sorted": "sorted", "elastic": "elastic"}.items():
        (study / name).symlink_to(chain / source)
    peers, run, ran = script(), subprocess.run, []

    def within(command: list[str], **options) -> None:
        """Run a stage in this process, and any other command as a process of its own."""
        if "flextron_mcore" not in command:
            run(command, **options)
            return
        ran.append(command[3:])
        stage(command[3], *command[4:])

    monkeypatch.setattr(peers.subprocess, "run", within)
    monkeypatch.setattr(peers, "SHARES", (1.0, 0.5))  # Llama wants a divisor of the channels
    monkeypatch.setattr(peers, "DEPTHS", (1.0, 0.5))
    monkeypatch.setattr("sys.argv", ["study_peers.py", str(study), str(tmp_path / "out")])
    peers.main()
    rows = json.loads((tmp_path / "out" / "peers.json").read_text())
    of = {training: [row for row in rows if row["training"] == training] for training in {row["training"] for row in rows}}
    assert [row["parameters"] for row in of["before"]] == [row["parameters"] for row in of["family"]]
    members = [row["parameters"] for row in of["family"]]
    alone = [*of["alone_full"], *(row for name in of for row in of[name] if name.startswith("alone_heads"))]
    assert sorted((row["parameters"] for row in alone), reverse=True) == members
    assert of["alone_random_weights"][0]["parameters"] == members[-1]
    assert of["before"][0]["code"] == pytest.approx(of["layers_before"][0]["code"], abs=1e-5)  # the full model
    trained = [command for command in ran if command[0] == "elastic"]
    assert len(trained) == 3 + len(members) and all("trainer.max_steps=6" in command for command in trained)
    printed = capsys.readouterr().out
    assert printed.count("| family |") == len(members)
    ran.clear()
    peers.main()  # everything is complete, so nothing runs
    assert not ran and capsys.readouterr().out.count("| family |") == len(members)


def test_an_unfinished_study_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["study_peers.py", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="data: has no metrics.json: run `flextron quickstart recipe=smollm2` to its end"):
        script().main()
