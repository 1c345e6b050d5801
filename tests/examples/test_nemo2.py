"""examples/nemo2: NeMo 2's llm.train has the losses of `flextron elastic`. docs/doors.md says what to install."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.conftest import stage

pytest.importorskip("nemo.collections.llm", reason="nemo-toolkit 2 is not installed")
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "nemo2" / "train_elastic.py"


def test_equals_our_loop(ours, tmp_path):
    run, _ = ours
    keys = ["model.micro_batch_size=4", "model.global_batch_size=8", "trainer.max_steps=4", "trainer.limit_val_batches=1"]
    constant = ["model.optim.sched.name=constant", "model.optim.sched.warmup_steps=0"]
    stage("elastic", f"checkpoint={run}/sorted", f"data={run}/data", *keys, *constant, f"out={tmp_path}/elastic")
    rows = [json.loads(line) for line in (tmp_path / "elastic" / "log.jsonl").read_text().splitlines()]
    wanted = [row["loss"] + sum(row["subnetwork_losses"]) for row in rows if row["event"] == "train"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, str(SCRIPT), f"{run}/sorted", f"{run}/data", "4"]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    found = re.findall(r"^step \d+ loss (\S+)", result.stdout, re.M)
    assert [float(value) for value in found] == pytest.approx(wanted, abs=1e-4), result.stdout + result.stderr
