"""`importance space.attention_unit=auto` at several layouts: the choice and the losses of one process."""

from __future__ import annotations

import json

import pytest

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.parallel.worker import run_jobs
from tests.stages.conftest import stage

LAYOUTS = {
    "data parallel": [],
    "sequence": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "pipeline": ["model.pipeline_model_parallel_size=2"],
}


def test_every_layout_chooses_the_unit_of_one_process(tmp_path, text):
    stage("prepare", f"input=[{text}/code,{text}/prose]", "vocab_size=300", "valid_fraction=0.2", f"out={tmp_path}/data")
    arch = toy.config(num_layers=2, num_attention_heads=16, num_query_groups=4, kv_channels=8, vocab_size=301)
    space = ElasticSpace.build(arch, granularity=2, heads=[0.5], ffn_hidden_size=[1.0])
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), tmp_path / "start")
    keys = [f"checkpoint={tmp_path}/start", f"data={tmp_path}/data", "samples=8", "ablation_batches=2", "ablation_random=false"]
    keys += ["model.micro_batch_size=2", "space.attention_unit=auto", "space.heads=[8]"]
    one = stage("importance", *keys, f"out={tmp_path}/one")
    jobs = [
        {"stage": "importance", "keys": [*keys, *layout, f"out={tmp_path}/{name}"], "layout": name}
        for name, layout in LAYOUTS.items()
    ]
    (tmp_path / "jobs").mkdir()
    for job in run_jobs(2, jobs, tmp_path / "jobs"):
        assert all("error" not in rank for rank in job), job
    rows = sum(one["attention_units"].values(), [])
    assert len({round(row["loss"], 4) for row in rows}) == len(rows) == 2
    for name in LAYOUTS:
        found = json.loads((tmp_path / name / "metrics.json").read_text())
        assert open_checkpoint(tmp_path / name).space == open_checkpoint(tmp_path / "one").space
        theirs = sum(found["attention_units"].values(), [])
        assert [row["loss"] for row in theirs] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
