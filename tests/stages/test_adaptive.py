"""Token routing by commands: `router kind=adaptive`, `evaluate selector=adaptive`, `generate`, `joint`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flextron_mcore.adaptive import training
from flextron_mcore.adaptive.assessment import Evaluator
from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.store import list_checkpoints, open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.settings.sections import KV_POLICIES
from flextron_mcore.training.loop import _Run
from flextron_mcore.training.speed import MEASURED
from tests.routing_toy import write_table
from tests.stages.conftest import TRAIN, finish_again, stage, stop_within
from tests.tasks_toy import measured, write_tasks

RUN = [*(key for key in TRAIN if "optim" not in key), "model.micro_batch_size=4", "model.global_batch_size=8"]
ADAPTIVE = ["kind=adaptive", "targets_per_step=2", "adaptive.calibration_samples=8", "validation_targets=[0.7,0.9]"]


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def routed(chain, tmp_path_factory) -> Path:
    """Run directory with static routers (static/), and adaptive ones that started from them (adaptive/)."""
    run = tmp_path_factory.mktemp("adaptive")
    table = write_table(chain / "elastic", run / "latency" / "latency.json")
    keys = [f"data={chain}/data", f"latency={table.parent}", *RUN]
    stage("router", f"checkpoint={chain}/elastic", *keys, "trainer.max_steps=6", "candidate_samples=4", f"out={run}/static")
    files = contents(run / "static")
    stage("router", *adaptive_keys(chain, run), f"out={run}/adaptive")
    assert contents(run / "static") == files  # new checkpoints hard-link files of the old one, which must not change
    return run


def test_a_run_killed_after_its_last_checkpoint_finishes(chain, routed, tmp_path):
    finish_again(routed / "adaptive", tmp_path / "again", "router", *adaptive_keys(chain, routed))


@pytest.mark.parametrize("moment", [9, 30])
def test_sigterm_drops_the_step_in_progress(chain, routed, tmp_path, monkeypatch, moment):
    stop_within(routed / "adaptive", tmp_path / "again", monkeypatch, moment, "router", *adaptive_keys(chain, routed))


def contents(run: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()}


def adaptive_keys(chain: Path, run: Path) -> list[str]:
    return [f"checkpoint={run}/static", f"data={chain}/data", *RUN, *ADAPTIVE, "trainer.max_steps=8"]


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def rows(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in found]


def test_text_from_a_choice_for_every_token(routed):
    keys = [f"checkpoint={routed}/adaptive", "prompt=['def main(',import]", "max_new_tokens=6", "selector=adaptive"]
    low, high = calibrated(routed)
    found = {policy: stage("generate", *keys, f"budget={(low + high) / 2}", f"kv_policy={policy}") for policy in KV_POLICIES}
    for figures in found.values():
        assert figures["cost"] == "latency" and low - 0.1 < figures["share"] < high + 0.1
        assert [row["prompt"] for row in figures["texts"]] == ["def main(", "import"]
    again = stage("generate", *keys, f"budget={(low + high) / 2}", "kv_policy=own")
    assert again["texts"] == found["own"]["texts"] and again["share"] == found["own"]["share"]


def calibrated(run: Path) -> tuple[float, float]:
    """Least and largest share of the full model's cost that the adaptive routers spend."""
    shares = [share for _, share in metrics(run / "adaptive")["calibration"]]
    return min(shares), max(shares)


def test_outputs_of_adaptive_routers(chain, routed):
    found = metrics(routed / "adaptive")
    assert found["routers"] == {"kind": "adaptive", "costs": ["latency"], "kv_policy": "full"}
    shares = [share for _, share in found["calibration"]]
    assert len(shares) >= 9 and max(shares) > min(shares)
    assert [row["target"] for row in found["adaptive_budgets"]] == [0.7, 0.9]
    for row in found["adaptive_budgets"]:
        assert row["adaptive"].keys() == {"full", "own"} and row["static"]["share"] <= row["target"]
        for outcome in row["adaptive"].values():
            assert outcome["loss"].keys() == outcome["shares"].keys() == {"code", "prose"}
            assert all(sum(block) == pytest.approx(1) for levels in outcome["levels"].values() for block in levels)
    train = [row for row in rows(routed / "adaptive") if row["event"] == "train"]
    assert len(train) == 8 and len(train[0]["targets"]) == len(train[0]["costs"]) == 2
    validated = [row["losses"] for row in rows(routed / "adaptive") if row["event"] == "validation"]
    assert validated[0].keys() == {"full", "adaptive 0.7", "adaptive 0.9"}
    assert len({row["full"] for row in validated}) == 1  # the model is frozen
    newest = list_checkpoints(routed / "adaptive")[-1]
    assert json.loads((newest / "routers.json").read_text())["calibration"] == found["calibration"]
    first, last = (load_file(list_checkpoints(routed / "adaptive")[i] / "routers.safetensors") for i in (0, -1))
    assert not first["out_NKU"].equal(last["out_NKU"]) and first["static.out_NKU"].equal(last["static.out_NKU"])
    described = [
        json.loads((list_checkpoints(routed / name)[-1] / "routers.json").read_text()) for name in ("static", "adaptive")
    ]
    assert described[0]["evaluated"] and described[0]["evaluated"] == described[1]["evaluated"]
    static = load_file(list_checkpoints(routed / "static")[-1] / "routers.safetensors")
    assert static["out_NKU"].equal(last["static.out_NKU"])


def test_a_checkpoint_with_adaptive_routers_still_serves_static_choices(routed, tmp_path):
    stage("select", "budget=0.8", f"checkpoint={routed}/static", f"out={tmp_path}/one.json")
    stage("select", "budget=0.8", f"checkpoint={routed}/adaptive", f"out={tmp_path}/two.json")
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


@pytest.mark.parametrize("kv_policy", ["full", "own"])
def test_evaluate_is_what_the_training_found(chain, routed, tmp_path, kv_policy):
    budget = "budget=0.9"
    keys = [f"checkpoint={routed}/adaptive", f"data={chain}/data", "model.micro_batch_size=4", "limit_val_batches=4"]
    found = stage("evaluate", *keys, "selector=adaptive", budget, f"kv_policy={kv_policy}", f"out={tmp_path}/out")
    assert found == metrics(tmp_path / "out") and found["kv_policy"] == kv_policy
    row = metrics(routed / "adaptive")["adaptive_budgets"][1]["adaptive"][kv_policy]
    assert found["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert found["shares"] == pytest.approx(row["shares"], rel=1e-5)
    again = stage("evaluate", *keys, "selector=adaptive", budget, f"kv_policy={kv_policy}", f"out={tmp_path}/again")
    assert again["loss"] == found["loss"]  # evaluation is deterministic
    stage("report", f"run={tmp_path}", f"out={tmp_path}/report")
    assert "Token routing, evaluated" in (tmp_path / "report" / "index.html").read_text()


def test_tasks_of_token_routing(chain, routed, tmp_path):
    """Scores and texts do not depend on padding and batches. Each budget has a row, with the cost that its tokens spent."""
    (tmp_path / "own").mkdir()
    keys = [f"checkpoint={routed}/adaptive", f"data={chain}/data", "limit_val_batches=1", "selector=adaptive", "kv_policy=own"]
    keys += ["tasks=[heldout_continuation,write,roll]", f"tasks_dir={write_tasks(tmp_path / 'own')}", "limit=7"]
    low, high = calibrated(routed)
    keys.append(f"budgets=[{high},{(low + high) / 2}]")
    found = {size: stage("evaluate", *keys, f"model.micro_batch_size={size}", f"out={tmp_path}/{size}") for size in (1, 4)}
    for one, other in zip(*(figures["budgets"] for figures in found.values()), strict=True):
        assert measured(one) == pytest.approx(measured(other), rel=1e-5, abs=1e-6)
        assert one["tasks_share"] == pytest.approx(other["tasks_share"], abs=0.02)
    rows = found[1]["budgets"]
    assert rows[0]["tasks_share"] > rows[1]["tasks_share"] and measured(rows[0]) != measured(rows[1])
    assert found[1]["loss"] == rows[0]["loss"]


@pytest.mark.parametrize("surrogate", [False, True])
def test_an_interrupted_run_continues_exactly(chain, routed, tmp_path, monkeypatch, surrogate):
    step, whole, keys = _Run._step, routed / "adaptive", adaptive_keys(chain, routed)
    if surrogate:
        whole, keys = tmp_path / "whole", [*keys, "adaptive.surrogate=true", "surrogate.threshold=1e9"]
        stage("router", *keys, f"out={whole}")
        assert all(row["routers_follow_surrogate"] for row in rows(whole) if row["event"] == "train")

    def stopping(self, number, log):
        if number == 5:
            raise Interrupted
        step(self, number, log)

    monkeypatch.setattr(_Run, "_step", stopping)
    with pytest.raises(Interrupted):
        stage("router", *keys, f"out={tmp_path}/parts")
    monkeypatch.setattr(_Run, "_step", step)
    assert open_checkpoint(tmp_path / "parts").step == 3
    older = contents(list_checkpoints(tmp_path / "parts")[-1])
    stage("router", *keys, f"out={tmp_path}/parts", "exp_manager.checkpoint_callback_params.keep_last=9")
    assert contents(list_checkpoints(tmp_path / "parts")[0]) == older
    assert rows(tmp_path / "parts") == rows(whole)
    ends = [load_file(list_checkpoints(out)[-1] / "routers.safetensors") for out in (tmp_path / "parts", whole)]
    assert all(ends[0][key].equal(ends[1][key]) for key in ends[1])


def test_a_continued_run_outlives_the_checkpoint_that_it_continued_from(chain, routed, tmp_path, monkeypatch):
    step, out = _Run._step, tmp_path / "out"
    saving = [f"exp_manager.checkpoint_callback_params.{key}=1" for key in ("every_n_train_steps", "keep_last")]
    for stop in (2, 5, None):

        def stopping(self, number, log, stop=stop):
            if number == stop:
                raise Interrupted
            step(self, number, log)

        monkeypatch.setattr(_Run, "_step", stopping)
        with pytest.raises(Interrupted) if stop else contextlib.nullcontext():
            stage("router", *adaptive_keys(chain, routed), *saving, f"out={out}")
        assert [path.name for path in list_checkpoints(out)] == [f"iter_000000{stop or 8}"]
    assert rows(out) == rows(routed / "adaptive")
    reader, source = (TensorReader(open_checkpoint(path)) for path in (out, routed / "static"))
    assert all(reader.read(key).equal(source.read(key)) for key in source.keys())  # noqa: SIM118


@pytest.mark.parametrize("name", ["router", "joint"])
def test_a_run_killed_while_it_calibrates_loses_one_step(chain, routed, tmp_path, monkeypatch, name):
    """A run that is killed during calibration, which can take long, repeats one step at most and ends with the same result."""
    keys = adaptive_keys(chain, routed)
    if name == "joint":
        more = ["targets_per_step=2", "model.optim.sched.warmup_steps=1", "trainer.max_steps=2"]
        keys = [f"checkpoint={routed}/adaptive", f"data={chain}/data", *RUN, *ADAPTIVE[2:], *more]
    calibrate, run, steps = Evaluator.calibrate, tmp_path / "parts", 2 if name == "joint" else 8

    def killed(self, model):
        assert open_checkpoint(run).step == steps - 1  # the step's checkpoint is whole by now
        raise Interrupted

    whole = stage(name, *keys, f"out={tmp_path}/whole")
    monkeypatch.setattr(Evaluator, "calibrate", killed)
    with pytest.raises(Interrupted):
        stage(name, *keys, f"out={run}")
    monkeypatch.setattr(Evaluator, "calibrate", calibrate)
    again = stage(name, *keys, f"out={run}")
    for key in ("calibration", "adaptive_budgets"):
        assert again[key] == whole[key], key
    assert rows(run) == rows(tmp_path / "whole")


def test_joint_tunes_model_and_adaptive_routers(chain, routed, tmp_path):
    keys = [f"checkpoint={routed}/adaptive", f"data={chain}/data", *RUN, "validation_targets=[0.9]", "trainer.max_steps=4"]
    more = ["model.optim.sched.warmup_steps=1", "adaptive.calibration_samples=8", "targets_per_step=2"]
    more += [f"teacher={chain}/parent", "distillation.weight=0.5"]
    stage("joint", *keys, *more, f"out={tmp_path}/joint")
    assert [len(row["distillation_losses"]) for row in rows(tmp_path / "joint") if row["event"] == "train"] == [3] * 4
    before, after = (TensorReader(open_checkpoint(path)) for path in (routed / "adaptive", tmp_path / "joint"))
    changed = [key for key in before.keys() if not before.read(key).equal(after.read(key))]  # noqa: SIM118
    assert any("mlp" in key for key in changed) and any("self_attention" in key for key in changed)
    routers = [load_file(list_checkpoints(run)[-1] / "routers.safetensors") for run in (routed / "adaptive", tmp_path / "joint")]
    assert not routers[0]["out_NKU"].equal(routers[1]["out_NKU"])
    plain = stage("joint", *keys, *more, "model.recompute_granularity=full", "model.recompute_method=uniform",
                  "model.recompute_num_layers=1", f"out={tmp_path}/recomputed")  # fmt: skip
    assert plain["adaptive_budgets"][0]["adaptive"]["full"]["mean_loss"] == pytest.approx(
        metrics(tmp_path / "joint")["adaptive_budgets"][0]["adaptive"]["full"]["mean_loss"], rel=1e-5
    )


@pytest.mark.parametrize(
    "keys, message",
    [
        (["kv_policy=none"], "kv_policy='none' is not known: use one of full, own"),
        (["adaptive.hidden_size=129"], "adaptive.hidden_size=129 must be within 1..128"),
        (["adaptive.calibration_samples=0"], "adaptive.calibration_samples=0 must be at least 1"),
        (["kind=gumbel"], "kind='gumbel' is not known: use one of static, adaptive"),
    ],
)
def test_bad_input_to_training_is_refused(chain, routed, tmp_path, keys, message):
    with pytest.raises(FlextronError, match=message.replace("(", r"\(")):
        stage("router", *adaptive_keys(chain, routed), *keys, f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "run, keys, message",
    [
        ("static", ["budget=0.9"], "its routers are static: train adaptive ones with `flextron router kind=adaptive`"),
        ("adaptive", [], "selector=adaptive: needs a budget"),
        ("adaptive", ["budget=0.9", "kv_policy=some"], "kv_policy='some' is not known"),
        ("adaptive", ["budget=0.9 parameters"], "serve one budget, of latency"),
        ("adaptive", ["budget=[0.9,0.9 parameters]"], "serve one budget, of latency"),
    ],
)
def test_bad_input_to_evaluate_is_refused(chain, routed, tmp_path, run, keys, message):
    with pytest.raises(FlextronError, match=message):
        stage("evaluate", f"checkpoint={routed}/{run}", f"data={chain}/data", "selector=adaptive", *keys, f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_a_table_that_counts_other_routers_is_warned_of(chain, routed, tmp_path, capsys):
    table = write_table(routed / "static", tmp_path / "latency.json", routed=True)
    keys = [*adaptive_keys(chain, routed), f"latency={table}", "trainer.max_steps=1"]
    for size in (32, 16):
        stage("router", *keys, f"adaptive.hidden_size={size}", f"out={tmp_path}/{size}")
        printed = capsys.readouterr().out
        assert ("measured with routers of 32 hidden units, not adaptive.hidden_size=16" in printed) is (size == 16)
        assert "its overhead is not counted" not in printed


@pytest.mark.parametrize("better, counted, said", [(-1.0, True, True), (1.0, True, False), (-1.0, False, False)])
def test_routing_that_costs_more_than_it_saves_is_reported(chain, routed, tmp_path, monkeypatch, capsys, better, counted, said):
    table = write_table(routed / "static", tmp_path / "latency.json", routed=counted)
    monkeypatch.setattr(training, "better", lambda row, kv_policy: better)
    keys = [f"latency={table}", "trainer.max_steps=1", f"out={tmp_path}/out"]
    stage("router", *adaptive_keys(chain, routed), *keys)
    assert ("routing costs more than it saves" in capsys.readouterr().out) is said


def test_adaptive_routers_need_static_ones(chain, tmp_path):
    keys = [f"checkpoint={chain}/elastic", f"data={chain}/data", *RUN, *ADAPTIVE, "trainer.max_steps=2", f"out={tmp_path}/out"]
    with pytest.raises(FlextronError, match="has no routers"):
        stage("router", *keys)
