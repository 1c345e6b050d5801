"""A tiny sorted checkpoint, and a run of `flextron elastic` from it, for comparison with other training loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.stages.conftest import pretrain_keys, stage

STEPS = 6


@pytest.fixture(scope="session")
def ours(tmp_path_factory, text) -> tuple[Path, list[dict]]:
    """Run directory with `data` and `sorted`, and the rows that `elastic` logged on the samples and networks of the examples."""
    run = tmp_path_factory.mktemp("doors")
    data, batch = f"data={run}/data", ["model.micro_batch_size=4", "model.global_batch_size=8"]
    stage("prepare", f"input=[{text}/code,{text}/prose]", "vocab_size=300", "valid_fraction=0.2", f"out={run}/data")
    stage("pretrain", *pretrain_keys(run / "data"), "trainer.max_steps=2", f"out={run}/parent")
    space = ["space.granularity=2", "space.heads=[0.5,1.0]"]
    stage("importance", f"checkpoint={run}/parent", data, "samples=16", "ablation_batches=1", *space, f"out={run}/sorted")
    steps = [f"trainer.max_steps={STEPS}", "model.optim.sched.warmup_steps=2", "trainer.limit_val_batches=1"]
    stage("elastic", f"checkpoint={run}/sorted", data, *batch, *steps, f"out={run}/elastic")
    rows = [json.loads(line) for line in (run / "elastic" / "log.jsonl").read_text().splitlines()]
    return run, [row for row in rows if row["event"] == "train"]
