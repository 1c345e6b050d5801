"""Static routers by commands: router, joint, select, sensitivity, compare, and budgets in evaluate and export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.store import list_checkpoints, open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import memory_cost, parameter_cost
from flextron_mcore.digests import seal
from flextron_mcore.settings.compose import compose
from flextron_mcore.space import SubNetwork
from flextron_mcore.stages import select
from flextron_mcore.training.loop import _Run
from flextron_mcore.training.speed import MEASURED
from tests.routing_toy import write_table
from tests.stages.conftest import TRAIN, finish_again, stage

RUN = [*(key for key in TRAIN if "optim" not in key), "model.micro_batch_size=4", "model.global_batch_size=8"]


def router_keys(run: Path, table: Path, *more: str) -> list[str]:
    keys = [f"checkpoint={run}/elastic", f"data={run}/data", f"latency={table}", *RUN, "trainer.max_steps=8"]
    return [*keys, *([] if any("candidate_samples" in key for key in more) else ["candidate_samples=0"]), *more]


@pytest.fixture(scope="module")
def routed(chain, tmp_path_factory) -> Path:
    """Run directory with a made-up latency table, and the outputs of router, joint and sensitivity."""
    run = tmp_path_factory.mktemp("routed")
    table = write_table(chain / "elastic", run / "latency" / "latency.json")
    stage("router", *router_keys(chain, table.parent, "candidate_samples=8", f"out={run}/router"))
    stage("sensitivity", f"checkpoint={run}/router", f"data={chain}/data", "limit_val_batches=1", f"out={run}/sensitivity")
    keys = [f"checkpoint={run}/router", f"data={chain}/data", *RUN, "trainer.max_steps=4"]
    stage("joint", *keys, "targets_per_step=2", f"out={run}/joint")
    return run


@pytest.mark.parametrize("name", ["router", "joint"])
def test_a_run_killed_after_its_last_checkpoint_finishes(chain, routed, tmp_path, name):
    keys = router_keys(chain, routed / "latency", "candidate_samples=8")
    if name == "joint":
        keys = [f"checkpoint={routed}/router", f"data={chain}/data", *RUN, "trainer.max_steps=4", "targets_per_step=2"]
    finish_again(routed / name, tmp_path / "again", name, *keys)


def rows(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in found]


def test_a_frozen_parent_teaches_in_joint_tuning(chain, routed, tmp_path):
    keys = [f"checkpoint={routed}/router", f"data={chain}/data", *RUN, "trainer.max_steps=2", "targets_per_step=2"]
    stage("joint", *keys, f"teacher={chain}/parent", "distillation.weight=0.5", f"out={tmp_path}/joint")
    train = [row for row in rows(tmp_path / "joint") if row["event"] == "train"]
    assert [len(row["distillation_losses"]) for row in train] == [3, 3]
    assert min(loss for row in train for loss in row["distillation_losses"]) > 1e-6


def test_outputs_of_router(chain, routed):
    metrics = json.loads((routed / "router" / "metrics.json").read_text())
    assert metrics["stage"] == "router" and metrics["steps"] == 8
    described = metrics["routers"]
    assert described == {"costs": ["latency"], "surrogate": True, "threshold": 0.2, "steps_followed": described["steps_followed"]}
    followed = [row["routers_follow_surrogate"] for row in rows(routed / "router") if row["event"] == "train"]
    assert described["steps_followed"] == sum(followed)
    assert len(metrics["budgets"]) == 5 and all(row["share"] <= row["target"] for row in metrics["budgets"])
    train = [row for row in rows(routed / "router") if row["event"] == "train"]
    assert len(train) == 8 and len(train[0]["subnetwork_losses"]) == 4 and "surrogate_error" in train[0]
    assert "learning_rate" not in train[0]
    validated = [row["losses"] for row in rows(routed / "router") if row["event"] == "validation"]
    assert validated[0].keys() == {"full", *(f"router {row['target']:g}" for row in metrics["budgets"])}
    assert len({row["full"] for row in validated}) == 1  # the model is frozen
    newest = list_checkpoints(routed / "router")[-1]
    assert {"routers.json", "routers.safetensors", "latency.json", "router_training.pt"} <= {p.name for p in newest.iterdir()}
    evaluated = dict((tuple(indices), loss) for indices, loss in json.loads((newest / "routers.json").read_text())["evaluated"])
    info = open_checkpoint(newest)
    for row in metrics["budgets"]:  # the best evaluated network within the budget, not only the likeliest
        assert tuple(Choices(info.model, info.space).indices(SubNetwork.from_dict(row["subnetwork"]))) in evaluated
    before, after = (TensorReader(open_checkpoint(path)) for path in (chain / "elastic", routed / "router"))
    assert all(before.read(key).equal(after.read(key)) for key in before.keys())  # noqa: SIM118
    weights = newest / "__0_0.distcp"
    assert weights.stat().st_ino == (open_checkpoint(chain / "elastic").path / "__0_0.distcp").stat().st_ino


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", ["router", "joint"])
def test_an_interrupted_run_continues_exactly(chain, routed, tmp_path, monkeypatch, name):
    def keys(out: str) -> list[str]:
        if name == "router":
            return router_keys(chain, routed / "latency", f"out={tmp_path}/{out}")
        source = [f"checkpoint={routed}/router", f"data={chain}/data", f"latency={routed}/latency"]
        return [*source, *RUN, "trainer.max_steps=8", "targets_per_step=2", f"out={tmp_path}/{out}"]

    stage(name, *keys("whole"))
    step = _Run._step

    def stopping(self, number, log):
        if number == 5:
            raise Interrupted
        step(self, number, log)

    monkeypatch.setattr(_Run, "_step", stopping)
    with pytest.raises(Interrupted):
        stage(name, *keys("parts"))
    monkeypatch.setattr(_Run, "_step", step)
    assert open_checkpoint(tmp_path / "parts").step == 3
    stage(name, *keys("parts"))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    ends = [load_file(list_checkpoints(tmp_path / out)[-1] / "routers.safetensors") for out in ("parts", "whole")]
    assert all(ends[0][key].equal(ends[1][key]) for key in ends[1])


def test_another_latency_table_is_another_run(chain, routed, tmp_path, monkeypatch):
    table = write_table(chain / "elastic", tmp_path / "latency.json")
    monkeypatch.setattr(_Run, "train", lambda self: (_ for _ in ()).throw(Interrupted))
    keys = router_keys(chain, table, f"out={tmp_path}/out")
    with pytest.raises(Interrupted):
        stage("router", *keys)
    monkeypatch.undo()
    step = _Run._step
    monkeypatch.setattr(_Run, "_step", lambda self, n, log: step(self, n, log) if n < 4 else (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        stage("router", *keys)
    monkeypatch.undo()
    write_table(chain / "elastic", table, constant={"minimum_ms": 9.0, "median_ms": 9.0})
    with pytest.raises(FlextronError, match="holds a run with another latency table"):
        stage("router", *keys)


def test_joint_tunes_model_and_routers(routed):
    metrics = json.loads((routed / "joint" / "metrics.json").read_text())
    assert metrics["stage"] == "joint" and metrics["routers"]["surrogate"] is False and len(metrics["budgets"]) == 5
    train = [row for row in rows(routed / "joint") if row["event"] == "train"]
    assert train[0]["learning_rate"] is not None and train[0]["grad_norm"] > 0 and len(train[0]["subnetwork_losses"]) == 2
    before, after = (list_checkpoints(routed / name)[-1] for name in ("router", "joint"))
    routers = [load_file(folder / "routers.safetensors") for folder in (before, after)]
    assert not routers[0]["out_NKU"].equal(routers[1]["out_NKU"])
    key = "decoder.layers.0.mlp.linear_fc1.weight"
    weights = [TensorReader(open_checkpoint(folder)).read(key) for folder in (before, after)]
    assert not torch.equal(*weights)
    metrics = stage("select", f"checkpoint={routed}/joint", "budget=0.8", "measure=false")
    assert metrics["costs"]["latency"]["share"] <= 0.8


@pytest.mark.parametrize("budget", ["0.8", "0.9 parameters", "100KiB", "[0.9,25K]"])
def test_a_selected_network_keeps_to_its_budget_everywhere(chain, routed, tmp_path, budget):
    """select, evaluate and export take one network, and its counted size is that of the exported files, to the byte."""
    checkpoint = f"checkpoint={routed}/router"
    kv = "kv_cache={batch_size: 2, length: 16}"
    metrics = stage("select", checkpoint, f"budget={budget}", "measure=false", kv, f"out={tmp_path}/sub/net.json")
    net = SubNetwork.from_file(tmp_path / "sub" / "net.json")
    assert net.to_dict() == metrics["subnetwork"]
    evaluated = stage(
        "evaluate", checkpoint, f"data={chain}/data", f"budget={budget}", kv, "limit_val_batches=1", f"out={tmp_path}/evaluate"
    )
    assert [row["subnetwork"] for row in evaluated["networks"]] == [net.to_dict()]
    exported = stage("export", checkpoint, f"budget={budget}", kv, "verify=true", f"out={tmp_path}/export")
    assert exported["subnetwork"] == net.to_dict()
    files = [load_file(file) for file in (tmp_path / "export").glob("*.safetensors")]
    info = open_checkpoint(routed / "router")
    weights = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
    cache = 2 * 2 * 16 * 4 * info.model.kv_channels * sum(layer.kv_groups for layer in net.layers)
    assert metrics["costs"]["parameters"]["value"] == sum(tensor.numel() for tensors in files for tensor in tensors.values())
    assert metrics["costs"]["memory"]["value"] == weights + cache
    memory = memory_cost(info.model, info.space, "fp32", 2, 16)
    parameters = parameter_cost(info.model, info.space)
    limits = {
        "0.8": [(metrics["costs"]["latency"]["share"], 0.8)],
        "0.9 parameters": [(parameters.of(net), 0.9 * parameters.full)],
        "100KiB": [(memory.of(net), 100 * 1024)],
        "[0.9,25K]": [(metrics["costs"]["latency"]["share"], 0.9), (parameters.of(net), 25e3)],
    }
    assert all(value <= limit * (1 + 1e-9) for value, limit in limits[budget])


def test_selection_measures_and_is_the_same_again(routed, tmp_path):
    keys = [f"checkpoint={routed}/router", "budget=0.8", "rounds=1"]
    first, second = (stage("select", *keys, f"out={tmp_path}/{i}.json") for i in range(2))
    assert first["device_latency"]["ms"] > 0 and first["device_latency"]["full_ms"] > 0
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    assert first["subnetwork"] == second["subnetwork"]


@pytest.mark.parametrize("name", ["uniform", "matformer", "sensitivity", "random"])
def test_other_selectors_keep_to_the_budget(chain, routed, name):
    keys = [f"checkpoint={chain}/elastic", f"selector={name}", f"latency={routed}/latency", "measure=false", "budget=0.85"]
    keys += [f"sensitivity={routed}/sensitivity"]
    random = [f"data={chain}/data", "random_networks=4", "limit_val_batches=1"]
    metrics = stage("select", *keys, *(random if name == "random" else []))
    assert metrics["costs"]["latency"]["share"] <= 0.85
    info = open_checkpoint(chain / "elastic")
    info.space.check(info.model, SubNetwork.from_dict(metrics["subnetwork"]))


def test_sensitivity_is_the_loss_of_one_smaller_block(chain, routed):
    metrics = json.loads((routed / "sensitivity" / "metrics.json").read_text())
    assert len(metrics["blocks"]) == 2 * 2 * 3
    one = metrics["blocks"][4]
    assert one["degradation"] == pytest.approx(one["loss"] - metrics["full_loss"])
    info = open_checkpoint(routed / "router")
    choices = Choices(info.model, info.space)
    net = choices.replaced(SubNetwork.full(info.model), 2 * one["layer"] + (one["axis"] != "heads"), 1)
    assert one["size"] == choices.sizes[1][1]
    (routed / "one.json").write_text(net.to_json())
    evaluated = stage(
        *("evaluate", f"checkpoint={routed}/router", f"data={chain}/data", f"subnetwork={routed}/one.json"),
        *("limit_val_batches=1", f"out={routed}/one"),
    )
    assert evaluated["mean"]["loss"] == one["loss"]


def test_compare_evaluates_every_selector_at_every_target(chain, routed, tmp_path):
    metrics = stage(
        *("compare", f"checkpoint={routed}/router", f"data={chain}/data", f"sensitivity={routed}/sensitivity"),
        *("selectors=[router,uniform,matformer,sensitivity,random]", "random_networks=3", "random_at_target=5"),
        *("targets=[0.8,0.95]", "limit_val_batches=1", f"dense=[{chain}/parent]", f"out={tmp_path}/out"),
    )
    found = {(row["selector"], row["target"]): row for row in metrics["networks"]}
    assert found.keys() == {(s, t) for s in ("router", "uniform", "matformer", "sensitivity", "random") for t in (0.8, 0.95)}
    assert all(row["share"] <= row["target"] for row in metrics["networks"])
    for row in metrics["random"]:
        assert 1 <= len(row["mean_losses"]) <= 5 and all(
            row["target"] - 0.01 <= share <= row["target"] for share in row["shares"]
        )
        ours = found["router", row["target"]]
        drawn = zip(row["shares"], row["mean_losses"], strict=True)
        others = [loss for share, loss in drawn if (share, loss) != (ours["share"], ours["mean_loss"])]
        wanted = sum(loss > ours["mean_loss"] for loss in others) / len(others) if others else None
        assert row["better_than"] == wanted
    assert len(metrics["equal"]) == 16 + 4 and all(row["router_share"] <= row["share"] + 1e-9 for row in metrics["equal"])
    (dense,) = metrics["dense"]
    assert dense["parameters"] == metrics["full"]["parameters"] and dense["cost"] == metrics["full_cost"]
    parent = stage("evaluate", f"checkpoint={chain}/parent", f"data={chain}/data", "limit_val_batches=1", f"out={tmp_path}/p")
    assert dense["mean_loss"] == parent["networks"][0]["mean"]["loss"]
    net = found["router", 0.8]["subnetwork"]
    (tmp_path / "net.json").write_text(json.dumps(net))
    keys = [f"checkpoint={routed}/router", f"data={chain}/data", "limit_val_batches=1", f"subnetwork={tmp_path}/net.json"]
    assert stage("evaluate", *keys, f"out={tmp_path}/e")["mean"]["loss"] == found["router", 0.8]["mean_loss"]
    again = stage(
        *("compare", f"checkpoint={routed}/router", f"data={chain}/data", "selectors=[router]", "random_at_target=0"),
        *("targets=[0.8]", "limit_val_batches=1", f"out={tmp_path}/again"),
    )
    assert again["networks"][0] == found["router", 0.8] and again["random"] == []  # evaluation has no noise


def test_a_budget_above_the_full_model(routed, tmp_path, capsys):
    keys = [f"checkpoint={routed}/router", f"out={tmp_path}/net.json"]
    found = stage("select", *keys, "budget=8GiB")
    info = open_checkpoint(routed / "router")
    assert found["subnetwork"] == SubNetwork.full(info.model).to_dict()
    said = " ".join(capsys.readouterr().out.split())
    assert "budget memory <= 8 GiB allows the full model, whose memory is" in said
    assert f"memory: weights and KV cache of 1 x {info.model.max_position_embeddings} tokens in fp32" in said


@pytest.mark.parametrize(
    "keys, message",
    [
        (["budget=0.1"], r"budget=0.1: .* ms is not within .* ms \(the smallest network, 0\.\d+ of the full model\)"),
        (["budget=2"], "budget=2: .* and .* ms \\(the full one\\)"),
        (["budget=3 parsecs"], "the unit 'parsecs' is not known: use one of latency"),
        (["budget=[]"], "budget: is empty"),
        (["budget=0.8", "selector=oracle"], "selector='oracle' is not known: use one of router, uniform"),
        (["budget=0.8", "selector=random"], "selector=random: evaluates networks on data: give data="),
        (["budget=0.8", "selector=sensitivity"], "selector=sensitivity: give sensitivity=, the directory that `flextron sens"),
        (["budget=0.8", "selector=sensitivity", "sensitivity=/gone"], "/gone: is not what `flextron sensitivity` writes"),
        (["budget=0.8", "latency=/gone.json"], "/gone.json: is not a latency table"),
        (["budget=0.8", "dtype=int3"], "dtype='int3' is not known: use one of fp32, bf16, fp16"),
        (["budget=0.8", "rounds=0"], "rounds=0 must be at least 1"),
        (["budget=0.8", "out={routed}/latency"], "is a directory; name a file"),
        (["budget=0.8", "out={routed}"], "contains the input checkpoint="),
        (["budget=0.8", "out={routed}/latency/latency.json"], "exists already; choose another, or overwrite=true"),
    ],
)
def test_bad_input_to_select_is_refused(routed, keys, message):
    with pytest.raises(FlextronError, match=message):
        stage("select", f"checkpoint={routed}/router", "measure=false", *(key.format(routed=routed) for key in keys))


def test_select_is_for_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FlextronError, match="select: is for one process: run it without torchrun"):
        select.run(compose("select", ["checkpoint=c", "budget=0.8"]))


def test_select_without_routers_or_table_says_what_to_give(chain, routed):
    keys = [f"checkpoint={chain}/elastic", "measure=false"]
    with pytest.raises(FlextronError, match="has no routers: train them with `flextron router`"):
        stage("select", *keys, "budget=0.8 parameters")
    with pytest.raises(
        FlextronError, match="of latency, which is not available here; available: parameters, memory; for latency give latency="
    ):
        stage("select", *keys, "budget=0.8", "selector=uniform")
    assert stage("select", *keys, "budget=0.8 parameters", "selector=uniform")["costs"]["parameters"]["share"] <= 0.8


@pytest.mark.parametrize(
    "name, keys, message",
    [
        ("router", ["targets.low=0.1"], r"targets.low=0.1 and targets.high=1 are no range within 0\.\d+ \(the smallest"),
        ("router", ["targets.high=1.1"], "targets.high=1.1 must be above 0 and at most 1"),
        ("router", ["costs=[speed]"], "costs: 'speed' is not available here; available: latency, parameters, memory"),
        ("router", ["latency=null"], None),
        ("router", ["latency=null", "costs=latency"], "costs: 'latency' is not available here: give latency=, a table of"),
        ("router", ["kind=psychic"], "kind='psychic' is not known: use one of static"),
        ("router", ["targets_per_step=0"], "targets_per_step=0 must be at least 1"),
        ("router", ["router.entropy=[0,1]"], "router.entropy=.* must be a list of 2 numbers, each above 0"),
        ("router", ["validation_targets=[0.1]"], "validation_targets: 0.1 is not within"),
        ("joint", [], "has no routers: train them with `flextron router`"),
    ],
)
def test_bad_input_to_training_is_refused(chain, routed, tmp_path, name, keys, message):
    common = [f"checkpoint={chain}/elastic", f"data={chain}/data", f"latency={routed}/latency", *RUN, "trainer.max_steps=1"]
    if message is None:  # without a table, budgets are shares of the parameters
        metrics = stage(name, *common, *keys, f"out={tmp_path}/out")
        assert metrics["routers"]["costs"] == ["parameters"]
        return
    with pytest.raises(FlextronError, match=message):
        stage(name, *common, *keys, f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_tables_that_do_not_belong_here_are_warned_of_or_refused(chain, routed, tmp_path, capsys):
    elsewhere = write_table(chain / "elastic", tmp_path / "elsewhere.json", machine={"device": "Abacus 3000"})
    keys = [f"checkpoint={routed}/router", "budget=0.8", "measure=false"]
    stage("select", *keys, f"latency={elsewhere}")
    assert "warning: the latency table is of another device: Abacus 3000; this one is" in capsys.readouterr().out
    stage("select", *keys)
    assert "warning" not in capsys.readouterr().out
    values = json.loads(elsewhere.read_text())
    values["model"]["hidden_size"] = 64
    (tmp_path / "other.json").write_text(json.dumps(seal(values)))
    with pytest.raises(FlextronError, match="other.json: is the latency table of another model"):
        stage("select", *keys, f"latency={tmp_path}/other.json")
    values = json.loads(elsewhere.read_text())
    values["mlp"].pop(0)
    (tmp_path / "short.json").write_text(json.dumps(seal(values)))
    with pytest.raises(FlextronError, match=r"short.json: lacks the candidates \[16\] of space.ffn_hidden_size"):
        stage("router", *router_keys(chain, tmp_path / "short.json", f"out={tmp_path}/out"))


def test_sensitivities_that_do_not_belong_here_are_refused(routed, tmp_path):
    keys = [f"checkpoint={routed}/router", "budget=0.8", "measure=false", "selector=sensitivity"]
    for change, message in (
        (lambda v: v["model"].update(ffn_hidden_size=128), "is of another model or space than checkpoint=: run `flextron sensi"),
        (lambda v: v["blocks"].pop(0), r"lacks candidate \d of block \d: run `flextron sensitivity` again"),
    ):
        values = json.loads((routed / "sensitivity" / "metrics.json").read_text())
        change(values)
        (tmp_path / "other.json").write_text(json.dumps(values))
        with pytest.raises(FlextronError, match=f"other.json: {message}"):
            stage("select", *keys, f"sensitivity={tmp_path}/other.json")


def test_a_range_of_targets(chain, routed, tmp_path, capsys):
    keys = router_keys(chain, routed / "latency", "targets.low=0.8", "targets.high=0.9", "trainer.max_steps=1")
    stage("router", *keys, f"out={tmp_path}/out")
    assert "warning: the surrogate's error never fell below surrogate.threshold" in capsys.readouterr().out
    (row,) = [row for row in rows(tmp_path / "out") if row["event"] == "train"]
    assert all(0.8 <= target <= 0.9 for (target,) in row["targets"])
    for budget, outside in (("0.85", False), ("0.7", True), ("0.95", True)):
        stage("select", f"checkpoint={tmp_path}/out", f"budget={budget}", "measure=false")
        warned = "is outside the range that the routers were trained for, 0.8 to 0.9" in " ".join(capsys.readouterr().out.split())
        assert warned == outside


def test_the_ablation_without_a_surrogate(chain, routed, tmp_path):
    metrics = stage("router", *router_keys(chain, routed / "latency", "surrogate.enabled=false", f"out={tmp_path}/out"))
    assert metrics["routers"]["surrogate"] is False
    train = [row for row in rows(tmp_path / "out") if row["event"] == "train"]
    assert "surrogate_loss" not in train[0] and len(train) == 8
    key = "out_NKU"
    parts = [load_file(folder / "routers.safetensors")[key] for folder in list_checkpoints(tmp_path / "out")]
    assert not parts[0].equal(parts[-1])
    assert metrics["validation"]["first"]["full"] == metrics["validation"]["last"]["full"]
