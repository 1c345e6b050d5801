"""Existing Megatron corpora and a rampup of the batch size give the losses of one process on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.parallel.worker import run_jobs
from tests.stages.conftest import TINY, TRAIN, stage

LAYOUTS = {"dp": {}, "tp": {"tensor_model_parallel_size": 2}}


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["event"] == "train"]


def test_losses_are_those_of_one_process(text: Path, tmp_path: Path) -> None:
    stage("prepare", f"input=[{text}/code,{text}/prose]", "vocab_size=300", "valid_fraction=0.2", f"out={tmp_path}/text")
    part = f"{tmp_path}/text"
    corpora = {
        "parts": f"{{train: [3,{part}/code_train,1,{part}/prose_train], validation: [{part}/prose_valid]}}",
        "list": f"[2,{part}/code_train,1,{part}/prose_train]",
    }
    sizes = ["model.micro_batch_size=2", "model.rampup_batch_size=[4,4,8]", "trainer.max_steps=5"]
    train = [*(f"model.{key}" for key in TINY), *TRAIN, *sizes, "space.granularity=2"]
    for name, paths in corpora.items():
        stage("prepare", f"paths={paths}", "split=[70,30]", f"tokenizer={part}/tokenizer", f"out={tmp_path}/{name}")
        stage("pretrain", f"data={tmp_path}/{name}", *train, f"out={tmp_path}/{name} one")
    jobs = [
        {
            "stage": "pretrain",
            "layout": layout,
            "keys": [
                *(f"data={tmp_path}/{name}", *train, *(f"model.{key}={size}" for key, size in shape.items())),
                f"out={tmp_path}/{name} {layout}",
            ],
        }
        for layout, shape in LAYOUTS.items()
        for name in corpora
    ]
    (tmp_path / "jobs").mkdir()
    for ranks in run_jobs(2, jobs, tmp_path / "jobs"):
        assert all("error" not in rank for rank in ranks), ranks
    for name in corpora:
        for layout in LAYOUTS:
            assert losses(tmp_path / f"{name} {layout}") == pytest.approx(losses(tmp_path / f"{name} one"), abs=1e-5)
