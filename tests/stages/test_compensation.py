"""Compensated query heads by commands: importance, training, exports of every kind, and sorting again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.space import SubNetwork, count_parameters
from tests.stages.conftest import TRAIN, stage

MODEL = [
    *("num_layers=2", "hidden_size=32", "num_attention_heads=6", "num_query_groups=2", "kv_channels=8", "ffn_hidden_size=64"),
    *("max_position_embeddings=32", "micro_batch_size=4", "global_batch_size=8"),
]
SPACE = ["space.attention_unit=query_head", "space.heads=[2,4,6]"]


@pytest.fixture(scope="module")
def runs(chain, tmp_path_factory) -> Path:
    """Run directory with `parent`, `plain` and `compensated` (sorted by energy, and with compensation), and `elastic`."""
    run = tmp_path_factory.mktemp("compensated")
    stage(
        "pretrain", f"data={chain}/data", *(f"model.{key}" for key in MODEL), *TRAIN, "trainer.max_steps=8", f"out={run}/parent"
    )
    keys = [f"checkpoint={run}/parent", f"data={chain}/data", "samples=24", "ablation_batches=4", *SPACE]
    stage("importance", *keys, f"out={run}/plain")
    stage("importance", *keys, "score.heads=compensated", f"out={run}/compensated")
    sizes = ["model.micro_batch_size=4", "model.global_batch_size=8"]
    keys = [f"checkpoint={run}/compensated", f"data={chain}/data", *TRAIN, *sizes, "trainer.max_steps=3"]
    stage("elastic", *keys, f"out={run}/elastic")
    return run


def losses(run: Path, order: str = "sorted") -> dict[str, float]:
    rows = json.loads((run / "metrics.json").read_text())["ablation"]
    return {row["setup"]: row["loss"] for row in rows if row["order"] == order}


def test_importance_writes_a_model_that_is_the_same(runs):
    before, after = losses(runs / "compensated", "unsorted"), losses(runs / "compensated")
    assert after["full (baseline)"] == pytest.approx(before["full (baseline)"], rel=1e-6)
    assert json.loads((runs / "compensated" / "metrics.json").read_text())["scores"]["heads"] == "compensated"
    info, plain = (open_checkpoint(runs / name) for name in ("compensated", "plain"))
    assert info.space.compensation and not plain.space.compensation and info.space == plain.space


def test_heads_lose_less_than_in_every_other_order(runs):
    """Validation losses of the tiny model that 8 steps trained."""
    [name] = [name for name in losses(runs / "plain") if name.endswith("heads")]
    others = [losses(runs / "plain", order)[name] for order in ("unsorted", "random", "sorted")]
    assert losses(runs / "compensated")[name] < min(others)


def test_training_keeps_the_matrices_and_trains_the_weights(runs):
    before, after = (TensorReader(open_checkpoint(runs / name)) for name in ("compensated", "elastic"))
    assert open_checkpoint(runs / "elastic").space.compensation and set(before.keys()) == set(after.keys())
    for key in before.keys():
        assert torch.equal(before.read(key), after.read(key)) == key.endswith("compensation"), key


@pytest.mark.parametrize("name", ["hf", "megatron"])
@pytest.mark.parametrize("widths", [(2, 2), (4, 4), (6, 6), (6, 2)])
def test_exports_have_its_logits(runs, tmp_path, name, widths):
    """`verify=true` compares logits of the export with those of the checkpoint."""
    info = open_checkpoint(runs / "elastic")
    layers = tuple(info.space.layer_choice(info.model, heads) for heads in widths)
    net = SubNetwork(info.model.hidden_size, layers)
    (tmp_path / "net.json").write_text(net.to_json())
    keys = [
        f"checkpoint={runs}/elastic",
        f"format={name}",
        f"subnetwork={tmp_path}/net.json",
        "verify=true",
        f"out={tmp_path}/out",
    ]
    found = stage("export", *keys)
    assert found["parameters"] == count_parameters(info.model, net) and found["max_logit_difference"] < 1e-5


def test_the_elastic_export_has_its_logits(runs, tmp_path):
    found = stage("export", f"checkpoint={runs}/elastic", "format=hf_elastic", "verify=true", f"out={tmp_path}/out")
    assert found["max_logit_difference"] < 1e-5


def test_sorting_again_starts_from_the_model_without(runs, chain, tmp_path):
    """A compensated checkpoint that is sorted again, by energy or by groups, has the losses that sorting the parent gives."""
    keys = [f"data={chain}/data", "samples=24", "ablation_batches=4"]
    stage("importance", f"checkpoint={runs}/compensated", *keys, f"out={tmp_path}/plain")
    assert losses(tmp_path / "plain") == pytest.approx(losses(runs / "plain"), rel=1e-5)
    assert losses(tmp_path / "plain", "unsorted") == pytest.approx(losses(runs / "compensated"), rel=1e-6)
    assert not any(key.endswith("compensation") for key in TensorReader(open_checkpoint(tmp_path / "plain")).keys())
    groups = [*keys, "space.attention_unit=kv_group", "space.heads=[3,6]", "space.granularity=1"]
    for name in ("parent", "compensated"):
        stage("importance", f"checkpoint={runs}/{name}", *groups, f"out={tmp_path}/{name} by groups")
    assert losses(tmp_path / "compensated by groups") == pytest.approx(losses(tmp_path / "parent by groups"), rel=1e-5)
    stage("importance", f"checkpoint={runs}/compensated", *keys, "score.heads=compensated", f"out={tmp_path}/compensated")
    assert losses(tmp_path / "compensated") == pytest.approx(losses(runs / "compensated"), rel=1e-5)


def test_it_is_refused_where_no_head_predicts_another(chain, runs, tmp_path):
    keys = [f"data={chain}/data", "samples=4", "score.heads=compensated", "space.granularity=1", f"out={tmp_path}/out"]
    with pytest.raises(FlextronError, match="score.heads=compensated: has an effect with space.attention_unit=query_head only"):
        stage("importance", f"checkpoint={runs}/parent", *keys, "space.attention_unit=kv_group", "space.heads=[3,6]")
    with pytest.raises(FlextronError, match="each KV group of this model has one query head"):
        stage("importance", f"checkpoint={chain}/parent", *keys, "space.attention_unit=query_head", "space.heads=[4]")


def test_an_export_may_refit_what_the_matrices_leave(runs, chain, tmp_path):
    """`compensate=true` refits the output projection to the compensated heads T h, before the export multiplies T into it."""
    info = open_checkpoint(runs / "compensated")
    (tmp_path / "net.json").write_text(info.space.uniform(info.model, heads=4).to_json())
    keys = ["compensate=true", "samples=24", "model.micro_batch_size=4", "limit_val_batches=2", f"data={chain}/data"]
    found = stage(
        "export", f"checkpoint={runs}/compensated", f"subnetwork={tmp_path}/net.json", *keys, f"out={tmp_path}/out", "verify=true"
    )
    assert found["max_logit_difference"] < 1e-4 and found["compensation"]["projections"] == 2
    assert found["compensation"]["loss"]["compensated"] != found["compensation"]["loss"]["cut"]
