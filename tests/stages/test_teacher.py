"""`teacher=DIR`: a frozen parent teaches all networks of `elastic`, `joint` and `gumbel`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.data.blend import open_data
from flextron_mcore.settings.compose import compose
from flextron_mcore.space import ElasticSpace
from flextron_mcore.training.teacher import open_teacher
from tests import toy
from tests.stages.conftest import TRAIN, log_rows, stage, stop_within

SIZES = dict(num_layers=2, num_attention_heads=4, ffn_hidden_size=64, vocab_size=300, max_position_embeddings=32)


def keys(chain: Path, teacher: Path, *more: str) -> list[str]:
    sizes = ["model.micro_batch_size=4", "model.global_batch_size=8", *TRAIN, "trainer.max_steps=4"]
    taught = [f"teacher={teacher}", "distillation.weight=0.7", "distillation.temperature=2.0"]
    return [f"checkpoint={chain}/sorted", f"data={chain}/data", *sizes, *taught, *more]


@pytest.fixture(scope="module")
def taught(chain, tmp_path_factory) -> Path:
    """Run directory with a copy of the parent, and an elastic training that it taught."""
    run = tmp_path_factory.mktemp("teacher")
    shutil.copytree(chain / "parent", run / "parent")
    stage("elastic", *keys(chain, run / "parent"), f"out={run}/elastic")
    return run


def test_the_parent_teaches_all_networks(chain, taught, tmp_path):
    """The full model starts as the parent, so its divergence is 0. A parent with sorted heads and neurons teaches the same."""
    train = [row for row in log_rows(taught / "elastic") if row["event"] == "train"]
    first = train[0]["distillation_losses"]
    assert len(first) == 4 and first[0] < 1e-6 and min(first[1:]) > 3e-5
    assert train[-1]["distillation_losses"][0] > 1e-6  # the full model has learned, the teacher has not
    stage("elastic", *keys(chain, chain / "sorted"), f"out={tmp_path}/other")
    other = [row for row in log_rows(tmp_path / "other") if row["event"] == "train"]
    for one, two in zip(train, other, strict=True):
        assert one["subnetwork_losses"] == pytest.approx(two["subnetwork_losses"], rel=1e-4)
        assert one["distillation_losses"][1:] == pytest.approx(two["distillation_losses"][1:], rel=1e-3)


def test_a_run_that_was_stopped_is_the_undisturbed_one(chain, taught, tmp_path, monkeypatch):
    """A stopped run continues with its teacher at another path, and is refused with another teacher."""
    stop_within(taught / "elastic", tmp_path / "again", monkeypatch, 38, "elastic", *keys(chain, taught / "parent"))
    shutil.copytree(taught / "elastic", tmp_path / "moved")
    (tmp_path / "moved" / "metrics.json").unlink()
    with pytest.raises(FlextronError, match=r"holds a run with another teacher than is now in teacher=.*/elastic: choose"):
        stage("elastic", *keys(chain, chain / "elastic"), f"out={tmp_path}/moved")
    stage("elastic", *keys(chain, chain / "parent"), f"out={tmp_path}/moved")


def test_the_full_model_alone_stays_where_the_parent_is(chain, taught, tmp_path):
    """With weight 1 the divergence is the only loss. It is 0 at first, and so is its gradient."""
    more = ["distillation.weight=1", "num_subnetworks=0", "model.optim.weight_decay=0"]
    figures = stage("elastic", *keys(chain, chain / "sorted", *more), f"out={tmp_path}/out")
    rows = [row for row in log_rows(tmp_path / "out") if row["event"] == "train"]
    assert all(row["grad_norm"] < 1e-4 and row["distillation_losses"][0] < 1e-5 for row in rows)
    assert figures["validation"]["last"]["full"] == pytest.approx(figures["validation"]["first"]["full"], abs=1e-3)


def other_model(run: Path, **changes) -> Path:
    arch: ModelConfig = toy.config(**{**SIZES, **changes})
    space = ElasticSpace.build(arch)
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), run)
    return run


@pytest.mark.parametrize(
    "changes, more, message",
    [
        ({}, ["distillation.weight=0"], r"teacher: has no effect with distillation.weight=0: set distillation.weight"),
        ({"vocab_size": 301}, [], r"teacher=.*: has a vocabulary of 301 tokens, the model one of 300: choose a teacher with"),
        ({"max_position_embeddings": 16}, [], r"has 16 positions, fewer than the 32 tokens of a sample: set model.seq_length=16"),
        ({"num_layers": 3}, ["trainer.max_steps=2"], None),
    ],
)
def test_other_teachers(chain, tmp_path, changes, more, message):
    command = [*keys(chain, other_model(tmp_path / "teacher", **changes), *more), f"out={tmp_path}/out"]
    if message is None:
        stage("elastic", *command)
        return
    with pytest.raises(FlextronError, match=message):
        stage("elastic", *command)
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_another_tokenizer_or_none_at_all_is_refused(chain, text, tmp_path):
    stage("prepare", f"input={text}/prose", "vocab_size=300", f"out={tmp_path}/data")
    teacher = other_model(tmp_path / "teacher")
    shutil.copytree(tmp_path / "data" / "tokenizer", teacher / "tokenizer")
    with pytest.raises(FlextronError, match=r"teacher=.*: has another tokenizer than data=.*: only one of the two has the token"):
        stage("elastic", *keys(chain, teacher), f"out={tmp_path}/out")
    with pytest.raises(FlextronError, match=r"teacher=.*/nowhere: no such directory"):
        stage("elastic", *keys(chain, tmp_path / "nowhere"), f"out={tmp_path}/out")
    with pytest.raises(FlextronError, match=r"teacher=.*/data: no checkpoint in it"):
        stage("elastic", *keys(chain, tmp_path / "data"), f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 64}, r"teacher=.*: has hidden_size 64, the model 32, and pipeline stages exchange one size only: set"),
        (
            {"num_layers": 3},
            r"teacher=.*: does not fit the parallel layout: model.pipeline_model_parallel_size=2: does not divide",
        ),
    ],
)
def test_a_teacher_that_a_pipeline_cannot_hold_is_refused(chain, tmp_path, changes, message):
    more = ["model.pipeline_model_parallel_size=2", f"out={tmp_path}/out"]
    settings = compose("elastic", keys(chain, other_model(tmp_path / "teacher", **changes), *more))
    with pytest.raises(FlextronError, match=message):
        open_teacher(settings, open_checkpoint(chain / "sorted"), open_data(chain / "data"))
