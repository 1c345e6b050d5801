"""Disk that a launch needs, against checkpoints of real trainings; and how often a training reads its data."""

from __future__ import annotations

from pathlib import Path

import pytest

from flextron_mcore.launch.plan import plan
from flextron_mcore.launch.storage import COLUMNS, checkpoint_bytes, preemptions, repeats, storage
from tests.stages.conftest import stage

MODEL = ["model=smoke", "model.hidden_size=128", "model.ffn_hidden_size=512", "model.vocab_size=300"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, text) -> Path:
    folder = tmp_path_factory.mktemp("storage") / "data"
    stage("prepare", f"input={{code: {text}/code, prose: {text}/prose}}", "vocab_size=300", f"out={folder}")
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_has_the_estimated_bytes(launch, data, tmp_path, precision):
    keys = [f"trainer.precision={precision}", "trainer.max_steps=1", "trainer.limit_val_batches=1", "model.global_batch_size=8"]
    stage("pretrain", f"data={data}", *MODEL, *keys, f"out={tmp_path}/run")
    written = sum(file.stat().st_size for file in (tmp_path / "run/checkpoints/iter_0000001").iterdir())
    config = launch("cluster=local", "gpus=1", *MODEL, "stages=[pretrain]", f"data={data}", f"pretrain.{keys[0]}")
    planned = plan(config)
    assert written == pytest.approx(checkpoint_bytes(planned, planned.jobs[0]), rel=0.05)


def rows(config) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in storage(config, plan(config))[1]}


def test_a_plan_says_how_often_it_saves_and_what_disk_that_needs(launch):
    """6.74 billion parameters: 14 bytes each in training, and one checkpoint more than are kept while one is written."""
    bare = ["cluster=slurm", "cluster.account=a", "model=llama2/7b"]
    found = rows(launch(*bare))
    assert found["elastic"] == {"job": "elastic", "checkpoint": "94.3", "saved every": "30 min", "kept": "2", "disk": "283.0"}
    assert found["import"]["disk"] == found["export_0.4"]["disk"] == "13.5" and found["latency"]["disk"] == "-"
    assert found["router"]["disk"] == "-"  # its checkpoints link the weights of elastic
    saving = "elastic.exp_manager.checkpoint_callback_params"
    # 80000 steps in 726 hours are 33 s a step.
    assert rows(launch(*bare, f"{saving}.every_n_train_steps=50"))["elastic"]["saved every"] == "50 steps"
    assert rows(launch(*bare, f"{saving}.every_minutes=null"))["elastic"]["saved every"] == "500 steps"
    assert rows(launch(*bare, "cluster.gpu.peak_tflops=null"))["elastic"]["saved every"] == "500 steps or 30 min"
    assert rows(launch(*bare, f"{saving}.keep_last=4"))["elastic"]["disk"] == "471.7"
    assert storage(config := launch(*bare), plan(config))[0] == "checkpoints and exports; GB of disk: 633"


def test_a_plan_says_what_a_preemption_costs(launch):
    bare = ["cluster=slurm", "cluster.account=a", "model=llama2/7b"]
    lines = list(preemptions(config := launch(*bare), plan(config)))
    assert [line.partition(":")[0] for line in lines] == ["elastic", "router", "joint"]
    assert "at most a step (33 s) where" in lines[0] and "a checkpoint of 94.3 GB, else at most 30 min" in lines[0]
    assert "for writing its routers, else at most 100 steps" in lines[1]
    assert "at most a step where" in next(preemptions(config := launch(*bare, "cluster.gpu.peak_tflops=null"), plan(config)))
    assert not list(preemptions(config := launch("cluster=local", "model=llama2/7b"), plan(config)))


def test_the_tokens_of_the_data_stand_beside_those_of_a_training(launch, data):
    keys = ["cluster=local", "model=smoke", "gpus=1", "stages=[pretrain,importance]", f"data={data}"]
    few = launch(*keys, "pretrain.trainer.max_steps=1", "model.max_position_embeddings=32", "pretrain.model.global_batch_size=1")
    (line,) = repeats(plan(few))
    assert line.startswith("pretrain: reads 32 tokens from ") and "prose 0.0" in line
    many = [*keys, "pretrain.trainer.max_steps=100000", "pretrain.model.global_batch_size=1", "model.max_position_embeddings=32"]
    (line,) = repeats(plan(launch(*many, "pretrain.data_weights={prose: 1.0}")))
    from flextron_mcore.data.blend import open_data

    there = open_data(data).domains["prose"].train_tokens
    assert line == f"pretrain: reads 3,200,000 tokens from {there:,}: prose {32 * 100000 / there:,.0f} times"
    (line,) = repeats(plan(launch(*many)))  # domains have equal shares, so the smaller one is read more often
    domains = open_data(data).domains
    smaller = min(domains, key=lambda name: domains[name].train_tokens)
    assert f": {smaller} {32 * 50000 / domains[smaller].train_tokens:,.0f} times, " in line
    assert list(repeats(plan(launch(*keys[:-1], "data=nowhere")))) == []
