"""The chain over all axes, by commands: importance, gumbel, then select, evaluate and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.store import CheckpointInfo, list_checkpoints, open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import parameter_cost
from flextron_mcore.routers.store import read_routers
from flextron_mcore.space import ElasticSpace, SubNetwork
from flextron_mcore.training.loop import _Run
from tests import toy
from tests.routing_toy import write_table
from tests.stages.conftest import TRAIN, finish_again, stage, stop_within
from tests.stages.test_routing import Interrupted, rows

AXES = ["space.hidden_size=[0.5,0.75,1.0]", "space.depth=[1,2]"]
UNIFORM = ["router.uniform=true", "modulation=true"]
RUN = [*TRAIN, "model.micro_batch_size=4", "model.global_batch_size=8", "candidate_samples=0"]


@pytest.fixture(scope="module")
def axes(chain, tmp_path_factory) -> Path:
    """Run directory with importance, a made-up latency table, and gumbel twice: layer by layer, and uniform with modulation."""
    run = tmp_path_factory.mktemp("axes")
    keys = [f"checkpoint={chain}/parent", f"data={chain}/data", *AXES, "samples=16", "layer_samples=8", "score.depth=mse"]
    stage("importance", *keys, f"out={run}/sorted")
    write_table(run / "sorted", run / "latency" / "latency.json")
    stage("gumbel", *gumbel_keys(chain, run), "candidate_samples=8", f"out={run}/gumbel")
    stage("gumbel", *gumbel_keys(chain, run), *UNIFORM, *taught(chain), f"out={run}/uniform")
    return run


def taught(chain: Path) -> list[str]:
    return [f"teacher={chain}/parent", "distillation.weight=0.3"]


def gumbel_keys(chain: Path, run: Path) -> list[str]:
    given = [f"checkpoint={run}/sorted", f"data={chain}/data", f"latency={run}/latency"]
    return [*given, *RUN, "trainer.max_steps=8", "router.soft_until=0.5"]


def test_a_run_killed_after_its_last_checkpoint_finishes(chain, axes, tmp_path):
    finish_again(axes / "gumbel", tmp_path / "again", "gumbel", *gumbel_keys(chain, axes), "candidate_samples=8")


@pytest.mark.parametrize("moment", [9, 30])
def test_sigterm_drops_the_step_in_progress(chain, axes, tmp_path, monkeypatch, moment):
    keys = [*gumbel_keys(chain, axes), "candidate_samples=8"]
    stop_within(axes / "gumbel", tmp_path / "again", monkeypatch, moment, "gumbel", *keys)


def test_importance_ranks_layers_and_channels(chain, axes):
    metrics = json.loads((axes / "sorted" / "metrics.json").read_text())
    space = open_checkpoint(axes / "sorted").space
    assert space.hidden_size == (16, 24, 32) and space.depth == (1, 2)
    errors = metrics["layers"]["mse"]
    assert list(space.layer_ranking) == sorted(range(2), key=lambda i: -errors[i])
    assert all(0 < value for part in metrics["layers"].values() for value in part) and len(errors) == 2
    assert load_file(axes / "sorted" / "scores.safetensors")["channels"].shape == (32,)
    assert [row["setup"] for row in metrics["ablation"]].count("16 of 32 hidden channels") == 3
    out = axes / "by_influence"
    keys = [f"checkpoint={chain}/parent", f"data={chain}/data", *AXES, "samples=16", "ablation_batches=0"]
    stage("importance", *keys, "score.depth=block_influence", f"out={out}")
    influence = json.loads((out / "metrics.json").read_text())["layers"]["block_influence"]
    assert list(open_checkpoint(out).space.layer_ranking) == sorted(range(2), key=lambda i: -influence[i])


def test_outputs_of_gumbel(axes):
    metrics = json.loads((axes / "gumbel" / "metrics.json").read_text())
    assert metrics["stage"] == "gumbel" and metrics["steps"] == 8
    assert all(row["share"] <= row["target"] for row in metrics["budgets"])
    train = [row for row in rows(axes / "gumbel") if row["event"] == "train"]
    assert len(train) == 8 and len(train[0]["subnetwork_losses"]) == 3
    assert [row["temperature"] for row in train] == sorted((row["temperature"] for row in train), reverse=True)
    assert train[1]["learning_rate"] > 0  # the model learns, too
    assert len({row["losses"]["full"] for row in rows(axes / "gumbel") if row["event"] == "validation"}) > 1


@pytest.mark.parametrize("name", ["gumbel", "uniform"])
def test_any_budget_gets_a_network(chain, axes, tmp_path, name):
    info = open_checkpoint(axes / name)
    cost, before = parameter_cost(info.model, info.space), 0.0
    for i, share in enumerate((0.3, 0.45, 0.6, 0.75, 0.9)):
        file = tmp_path / f"{i}.json"
        found = stage("select", f"checkpoint={axes}/{name}", f"budget={share} parameters", "measure=false", f"out={file}")
        net = SubNetwork.from_file(file)
        info.space.check(info.model, net)
        assert before <= cost.of(net) <= share * cost.full
        assert net.is_uniform or name == "gumbel"
        before = cost.of(net)
        assert found
    stage("evaluate", f"checkpoint={axes}/{name}", f"data={chain}/data", "budget=0.6", "limit_val_batches=1", f"out={tmp_path}/e")
    exported = stage("export", f"checkpoint={axes}/{name}", "budget=0.6", f"out={tmp_path}/hf")
    assert exported["architecture"] == "LlamaForCausalLM" or name == "gumbel"


def test_an_interrupted_run_continues_exactly(chain, axes, tmp_path, monkeypatch):
    step = _Run._step
    monkeypatch.setattr(_Run, "_step", lambda self, n, log: step(self, n, log) if n < 5 else (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        stage("gumbel", *gumbel_keys(chain, axes), *UNIFORM, *taught(chain), f"out={tmp_path}/parts")
    monkeypatch.undo()
    assert open_checkpoint(tmp_path / "parts").step == 3
    stage("gumbel", *gumbel_keys(chain, axes), *UNIFORM, *taught(chain), f"out={tmp_path}/parts")
    assert rows(tmp_path / "parts") == rows(axes / "uniform")
    ends = [load_file(list_checkpoints(out)[-1] / "routers.safetensors") for out in (tmp_path / "parts", axes / "uniform")]
    assert all(ends[0][key].equal(ends[1][key]) for key in ends[1])
    parts, whole = modulations(tmp_path / "parts"), modulations(axes / "uniform")
    assert all(parts[key].equal(whole[key]) for key in whole)


def modulations(run: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(open_checkpoint(run))
    return {key: reader.read(key) for key in reader.keys() if key.endswith("modulation")}


def test_modulation_is_learned_and_goes_on(chain, axes, tmp_path):
    """Gains are learned in every block, also by a continued training whose command does not name modulation."""
    assert open_checkpoint(axes / "uniform").space.modulation and not open_checkpoint(axes / "gumbel").space.modulation
    before = modulations(axes / "uniform")
    assert len(before) == 4 and all(value.all() for value in before.values()) and not modulations(axes / "gumbel")
    keys = [f"checkpoint={axes}/uniform", f"data={chain}/data", *RUN, "trainer.max_steps=1", "model.optim.sched.warmup_steps=0"]
    stage("elastic", *[key for key in keys if "candidate" not in key], f"out={tmp_path}/elastic")
    stage("gumbel", *keys, "router.uniform=true", "costs=latency", f"latency={axes}/latency", f"out={tmp_path}/gumbel")
    for name in ("elastic", "gumbel"):
        assert open_checkpoint(tmp_path / name).space.modulation
        after = modulations(tmp_path / name)
        assert all((after[key] != value).any() for key, value in before.items())


def test_training_goes_on_from_its_own_checkpoint(chain, axes, tmp_path):
    from flextron_mcore.choices import Choices

    keys = [key for key in gumbel_keys(chain, axes) if not key.startswith(("checkpoint", "trainer.max_steps"))]
    stage("gumbel", f"checkpoint={axes}/gumbel", *keys, "trainer.max_steps=1", "router.lr=1e-9", f"out={tmp_path}/more")
    info = open_checkpoint(tmp_path / "more")
    choices = Choices(info.model, info.space)
    (_, before), (_, after) = (read_routers(open_checkpoint(run).path, choices) for run in (axes / "gumbel", tmp_path / "more"))
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "name, keys, message",
    [
        ("gumbel", ["router.weighted_per_step=4"], "router.weighted_per_step=4 is not within 1 and targets_per_step=3"),
        ("gumbel", ["router.temperature=[1,0]"], "must be a list of 2 numbers, each above 0"),
        ("gumbel", ["costs=latency", "latency=null"], "costs: 'latency' is not available here: give latency="),
        ("router", [], r"space.hidden_size is elastic, \[16, 24, 32\], and `flextron router` chooses heads and neurons only"),
        ("sensitivity", [], "`flextron sensitivity` chooses heads and neurons only"),
        ("compare", ["selectors=[sensitivity]"], "selector=sensitivity chooses heads and neurons only"),
    ],
)
def test_bad_input_is_refused(chain, axes, tmp_path, name, keys, message):
    given = [f"checkpoint={axes}/sorted", f"data={chain}/data", f"out={tmp_path}/out"]
    given += [f"latency={axes}/latency"] if name != "sensitivity" else []
    with pytest.raises(FlextronError, match=message):
        stage(name, *given, *keys)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FlextronError, match="its router was trained with router.uniform=true and costs="):
        stage("gumbel", f"checkpoint={axes}/uniform", *gumbel_keys(chain, axes)[1:], f"out={tmp_path}/out")


def test_modulation_is_of_whole_networks_and_stays(chain, axes, tmp_path):
    with pytest.raises(FlextronError, match="uniform.*: has modulation, which its networks need: leave modulation=false out"):
        stage("gumbel", f"checkpoint={axes}/uniform", *gumbel_keys(chain, axes)[1:], "modulation=false", f"out={tmp_path}/out")
    arch = open_checkpoint(chain / "sorted").model
    space = ElasticSpace.build(arch, modulation=True)
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), tmp_path / "widths")
    shutil.copytree(chain / "sorted" / "tokenizer", tmp_path / "widths" / "tokenizer")
    given = [f"checkpoint={tmp_path}/widths", f"out={tmp_path}/out"]
    for name, *keys in (("router", f"data={chain}/data", "kind=adaptive"), ("latency", "routed.enabled=true")):
        with pytest.raises(FlextronError, match="was trained with modulation, which token routing does not support"):
            stage(name, *given, *keys)
    assert not (tmp_path / "out").exists()


def test_joint_training_is_of_other_routers(chain, axes, tmp_path):
    with pytest.raises(FlextronError, match="its router chooses on all axes: continue its training with `flextron gumbel`"):
        stage("joint", f"checkpoint={axes}/gumbel", f"data={chain}/data", f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()
