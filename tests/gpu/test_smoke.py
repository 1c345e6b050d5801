"""The whole chain in bf16 on one GPU, from text to an export, each stage by its command."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flextron_mcore.adaptive.serving import routers_at_budget
from flextron_mcore.adaptive.table import RoutedTable
from flextron_mcore.checkpoint.store import list_checkpoints, open_checkpoint
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.latency.measure import device_name
from flextron_mcore.latency.table import LatencyTable
from flextron_mcore.model import loaded_model
from flextron_mcore.pipeline.logits import forward_logits
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.settings.stages import EvaluateSettings
from flextron_mcore.space import SubNetwork
from tests.stages.conftest import stage

MODEL = ["num_layers=3", "hidden_size=64", "num_attention_heads=8", "num_query_groups=4", "ffn_hidden_size=160"]
MODEL += ["max_position_embeddings=64"]
TRAIN = ["trainer.precision=bf16", "trainer.limit_val_batches=4", "exp_manager.checkpoint_callback_params.every_n_train_steps=10"]
TRAIN += ["model.micro_batch_size=8", "model.global_batch_size=16"]
WARM = ["model.optim.sched.warmup_steps=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, text) -> Path:
    """Run directory with data/: the fixture's text, prepared as two domains."""
    out = tmp_path_factory.mktemp("smoke")
    stage("prepare", f"input=[{text}/code,{text}/prose]", "vocab_size=512", "valid_fraction=0.1", f"out={out}/data")
    return out


@pytest.fixture(scope="module")
def parent(run) -> dict:
    keys = [f"data={run}/data", *(f"model.{key}" for key in MODEL), *TRAIN, *WARM, "model.optim.lr=1e-2", "trainer.max_steps=60"]
    return stage("pretrain", *keys, "trainer.val_check_interval=30", f"out={run}/parent")


@pytest.fixture(scope="module")
def importance(run, parent) -> dict:
    return stage(
        "importance", f"checkpoint={run}/parent", f"data={run}/data", "samples=64", "ablation_batches=4", f"out={run}/sorted"
    )


def elastic_keys(run: Path) -> list[str]:
    keys = [f"checkpoint={run}/sorted", f"data={run}/data", *TRAIN, *WARM, "model.optim.lr=3e-3", "trainer.max_steps=30"]
    return [*keys, "trainer.val_check_interval=15", "distillation.weight=0.3"]


@pytest.fixture(scope="module")
def elastic(run, importance) -> dict:
    return stage("elastic", *elastic_keys(run), f"out={run}/elastic")


@pytest.fixture(scope="module")
def latency(run, elastic) -> dict:
    return stage("latency", f"checkpoint={run}/elastic", "rounds=5", "check_networks=4", f"out={run}/latency")


@pytest.fixture(scope="module")
def router(run, latency) -> dict:
    keys = [
        f"checkpoint={run}/elastic",
        f"data={run}/data",
        f"latency={run}/latency",
        *TRAIN,
        "trainer.max_steps=40",
        "candidate_samples=8",
    ]
    return stage("router", *keys, "trainer.val_check_interval=20", f"out={run}/router")


@pytest.fixture(scope="module")
def joint(run, router) -> dict:
    keys = [f"checkpoint={run}/router", f"data={run}/data", *TRAIN, *WARM, "trainer.max_steps=10"]
    return stage("joint", *keys, "trainer.val_check_interval=5", f"out={run}/joint")


def log(run: Path, name: str) -> list[dict]:
    """Rows of the training steps in a run's log. Asserts that all figures are finite."""
    rows = [json.loads(line) for line in (run / name / "log.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["event"] == "train"]
    assert [row["step"] for row in train] == list(range(1, len(train) + 1))
    for row in train:
        losses = [row["loss"], *row.get("subnetwork_losses", [])]
        assert all(map(math.isfinite, losses)) and (row.get("grad_norm") is None or 0 < row["grad_norm"] < math.inf)
    return train


def test_pretrain(run, parent):
    train = log(run, "parent")
    assert len(train) == 60 and train[0]["loss"] == pytest.approx(math.log(512), abs=0.3)
    assert parent["validation"]["last"]["full"] < parent["validation"]["first"]["full"] - 1
    assert open_checkpoint(run / "parent").dtype == "bf16"


def test_importance(run, importance):
    assert open_checkpoint(run / "sorted").sorted and all(math.isfinite(row["loss"]) for row in importance["ablation"])
    full = {row["order"]: row["loss"] for row in importance["ablation"] if row["setup"].startswith("full")}
    assert full["sorted"] == pytest.approx(full["unsorted"], abs=0.01)  # sorting changes the order of units, not the full model


def test_elastic(run, elastic):
    train = log(run, "elastic")
    assert len(train) == 30 and all(len(row["subnetwork_losses"]) == 3 for row in train)
    first, last = elastic["validation"]["first"], elastic["validation"]["last"]
    assert all(last[name] < first[name] for name in first if name != "full")
    assert last["full"] < first["full"] + 0.1


def test_a_run_that_was_interrupted_continues(run, elastic):
    """The run continues from its checkpoint of step 20, which was written in the background."""
    shutil.copytree(run / "elastic", run / "again")
    (run / "again" / "metrics.json").unlink()
    shutil.rmtree(list_checkpoints(run / "again")[-1])
    assert open_checkpoint(run / "again").step == 20
    metrics = stage("elastic", *elastic_keys(run), f"out={run}/again")
    whole, continued = (log(run, name) for name in ("elastic", "again"))
    assert len(continued) == 30
    # Sums on a GPU have no fixed order, so losses in bf16 drift apart between runs.
    assert [row["loss"] for row in continued] == pytest.approx([row["loss"] for row in whole], abs=0.05)
    assert metrics["validation"]["last"]["full"] == pytest.approx(elastic["validation"]["last"]["full"], abs=0.05)


@pytest.mark.parametrize("generation", [False, True])
def test_latency(run, latency, generation, tmp_path):
    if generation:
        setting = ["setting.kind=generation", "setting.generated_tokens=4", "setting.batch_size=1"]
        latency = stage("latency", f"checkpoint={run}/elastic", *setting, "rounds=2", "check_networks=2", f"out={tmp_path}/out")
    assert latency["machine"]["device"] == device_name() and latency["machine"]["dtype"] == "bfloat16"
    assert 0 < latency["smallest_network_ms"] and 0 < latency["full_model_ms"] and math.isfinite(latency["check"]["median_error"])
    info = open_checkpoint(run / "elastic")
    table = LatencyTable.from_file((tmp_path / "out" if generation else run / "latency") / "latency.json", info.model, info.space)
    (timings,) = table.timings.values()
    assert all(timing.minimum > 0 for timing in (timings.constant, *chain(*timings.candidates.values())))


def test_latency_of_tokens_that_choose(run, elastic, tmp_path):
    routed = ["routed.enabled=true", "routed.hidden_size=16", "routed.rounds=2", "rounds=2", "check_networks=2"]
    stage("latency", f"checkpoint={run}/elastic", *routed, f"out={tmp_path}/out")
    info = open_checkpoint(run / "elastic")
    table = LatencyTable.from_file(tmp_path / "out" / "latency.json", info.model, info.space)
    for policy in ("full", "own"):
        routed = RoutedTable.read(table, policy)
        assert all(value >= 0 for part in (routed.levels, routed.overhead) for value in chain(*part.values()))
        assert all(max(costs) > 0 for costs in routed.levels.values())


def test_routers(run, router, joint):
    assert len(log(run, "router")) == 40 and len(log(run, "joint")) == 10
    full = {row["full"] for row in validated(run, "router")}
    assert len(full) == 1  # the model is frozen
    for metrics in (router, joint):
        assert len(metrics["budgets"]) == 5 and all(row["share"] <= row["target"] for row in metrics["budgets"])
        assert all(math.isfinite(loss) for loss in metrics["validation"]["last"].values())
    assert joint["validation"]["last"]["full"] < joint["validation"]["first"]["full"] + 0.1


@pytest.fixture(scope="module")
def adaptive(run, router) -> dict:
    keys = [
        f"checkpoint={run}/router",
        f"data={run}/data",
        *TRAIN,
        "kind=adaptive",
        "adaptive.hidden_size=16",
        "targets_per_step=2",
    ]
    keys += ["adaptive.calibration_samples=16", "validation_targets=[1.0]", "trainer.max_steps=20"]
    return stage("router", *keys, "trainer.val_check_interval=10", f"out={run}/adaptive")


def test_tokens_choose_for_themselves(run, adaptive):
    assert len(log(run, "adaptive")) == 20 and len({row["full"] for row in validated(run, "adaptive")}) == 1  # frozen
    shares = [share for _, share in adaptive["calibration"]]
    assert 0 < min(shares) < max(shares)
    for row in adaptive["adaptive_budgets"]:
        assert all(math.isfinite(loss) for policy in ("full", "own") for loss in row["adaptive"][policy]["loss"].values())
    budget = f"budget={(min(shares) + max(shares)) / 2}"
    keys = [f"checkpoint={run}/adaptive", "selector=adaptive", budget]
    found = stage("evaluate", *keys, f"data={run}/data", "limit_val_batches=4", f"out={run}/routed")
    assert all(map(math.isfinite, found["loss"].values()))
    for policy in ("full", "own"):
        text = stage("generate", *keys, "prompt=['def main(',import]", "max_new_tokens=6", f"kv_policy={policy}")
        assert len(text["texts"]) == 2 and math.isfinite(text["share"])


def test_the_exported_family_chooses_for_every_token_the_same(run, adaptive, device, tmp_path):
    stage("export", f"checkpoint={run}/adaptive", "format=hf_elastic", "verify=true", f"out={tmp_path}/family")
    info = open_checkpoint(run / "adaptive")
    tokens = torch.randint(0, info.model.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0)).to(device)
    theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "family", trust_remote_code=True, dtype=torch.float32).to(device).eval()
    )
    (ours,) = loaded_model(LayoutSettings(), info, "fp32")
    shares = [share for _, share in adaptive["calibration"]]
    budget = (min(shares) + max(shares)) / 2
    theirs.set_budget(budget, adaptive=True)
    settings = EvaluateSettings(checkpoint=str(info.path), budget=budget)
    routing = routers_at_budget(settings, info).routing()
    routing.begin()
    with torch.no_grad(), use_subnetwork(ours.eval(), routing):
        expected = ours(tokens, torch.arange(64, device=device).expand(2, -1), None)
        found = theirs(tokens).logits
    assert found.device.type == expected.device.type == device.type
    assert ((found - expected).square().mean() / expected.square().mean()).sqrt() < 1e-4


def validated(run: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / name / "log.jsonl").read_text().splitlines()]
    return [row["losses"] for row in rows if row["event"] == "validation"]


@pytest.fixture(scope="module")
def selected(run, joint) -> dict:
    return stage("select", f"checkpoint={run}/joint", "budget=0.8 parameters", "rounds=2", f"out={run}/net.json")


def test_select_and_evaluate(run, selected, elastic):
    assert selected["costs"]["parameters"]["share"] <= 0.8
    assert selected["device_latency"]["ms"] > 0 and selected["device_latency"]["full_ms"] > 0
    keys = [f"checkpoint={run}/elastic", f"data={run}/data", "limit_val_batches=8", "random=2"]
    metrics = stage("evaluate", *keys, f"out={run}/evaluate")
    losses = {row["name"]: row["mean"]["loss"] for row in metrics["networks"]}
    assert all(map(math.isfinite, losses.values())) and losses["full"] < min(losses.values()) + 0.02
    # Equal samples in equal batches round in bf16 to equal losses.
    assert losses["full"] == pytest.approx(elastic["validation"]["last"]["full"], abs=1e-3)


@pytest.mark.parametrize("what", ["full", "selected"])
def test_the_export_is_the_network(run, selected, device, what, tmp_path):
    network = [] if what == "full" else [f"subnetwork={run}/net.json"]
    exported = stage("export", f"checkpoint={run}/joint", *network, "verify=true", f"out={tmp_path}/{what}")
    assert math.isfinite(exported["max_logit_difference"])
    info = open_checkpoint(run / "joint")
    net = SubNetwork.from_file(run / "net.json") if network else None
    tokens = torch.randint(0, info.model.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    options = LayoutSettings()
    for precision, dtype, allowed in (("fp32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 0.03)):
        ours = forward_logits(loaded_model(options, info, precision), net, tokens)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / what, trust_remote_code=True, dtype=dtype).to(device).eval()
        with torch.no_grad():
            found = theirs(tokens.to(device)).logits.float()
        assert found.device.type == ours.device.type == device.type
        error = ((found - ours).square().mean() / ours.square().mean()).sqrt().item()
        assert error < allowed, f"{precision}: {error:.1e}"


def test_the_command(run, router):
    """`flextron` in a process of its own, as users start it, and then the report of the run."""
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launch}
    command = [sys.executable, "-m", "flextron_mcore", "evaluate", f"checkpoint={run}/router", f"data={run}/data"]
    command += ["budget=1.0", "limit_val_batches=1", f"out={run}/command"]
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert math.isfinite(json.loads((run / "command" / "metrics.json").read_text())["mean"]["loss"])
    stage("report", f"run={run}", f"out={run}/report")
    assert (run / "report" / "index.html").stat().st_size > 10_000
