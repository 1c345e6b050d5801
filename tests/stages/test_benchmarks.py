"""Every benchmark runs on tiny models; timings are not checked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import average_time, dispatch, equal_time, gradients, llama_cpp, modelopt, models, slice, step, stream, trained
from flextron_mcore.config import FlextronError, ModelConfig
from tests.routing_toy import write_table
from tests.stages.conftest import TRAIN, stage

RUN = [*(key for key in TRAIN if "optim" not in key), "model.micro_batch_size=4", "model.global_batch_size=8"]


@pytest.fixture(scope="module")
def runs(chain, tmp_path_factory) -> Path:
    """Run directory with static routers, and adaptive ones whose latency table counts routing."""
    run = tmp_path_factory.mktemp("benchmarks")
    table = write_table(chain / "elastic", run / "latency.json", routed=True)
    keys = [f"data={chain}/data", f"latency={table}", *RUN, "trainer.max_steps=4"]
    stage("router", f"checkpoint={chain}/elastic", *keys, "candidate_samples=0", f"out={run}/static")
    adaptive = ["kind=adaptive", "targets_per_step=2", "adaptive.calibration_samples=8", "validation_targets=[0.9]"]
    stage("router", f"checkpoint={run}/static", *keys, *adaptive, f"out={run}/adaptive")
    return run


def printed(capsys, name: str) -> list[list[str]]:
    """Cells of each row of the printed table `name`."""
    text = capsys.readouterr().out
    assert f"\n{name}" in text
    return [[cell.strip() for cell in line.strip("│\n").split("│")] for line in text.splitlines() if line.startswith("│")]


def test_average_time_runs(chain, runs, monkeypatch, capsys):
    shares = sorted(share for _, share in json.loads((runs / "adaptive" / "metrics.json").read_text())["calibration"])
    middle = round(shares[len(shares) // 2], 3)
    monkeypatch.setattr(average_time, "BUDGETS", (0.01, middle))
    average_time._run(str(chain / "data"), str(runs / "adaptive"), passes=1, rounds=2)
    (row,) = printed(capsys, "average_time")  # the routers cannot meet the budget 0.01
    assert row[:3] == ["adaptive", "full", f"{middle:g}"] and 0 < float(row[3]) < 2
    with pytest.raises(FlextronError, match="no latency table of a prefill that includes routing"):
        average_time._run(str(chain / "data"), str(chain / "elastic"))
    with pytest.raises(FlextronError, match="rounds=1: must be at least 2, for quartiles"):
        average_time._run(str(chain / "data"), str(runs / "adaptive"), rounds=1)
    with pytest.raises(FlextronError, match="static: .*its routers are static"):
        average_time._run(str(chain / "data"), str(runs / "static"))


def test_equal_time_runs(chain, runs, monkeypatch, capsys):
    for name, value in {"TARGETS": (0.9,), "LADDER": [0.95, 1.0], "BATCH": 2}.items():
        monkeypatch.setattr(equal_time, name, value)
    numbers = ["sequences=1", "samples=4", "rounds=2"]
    monkeypatch.setattr("sys.argv", ["equal_time", str(runs / "static"), str(chain / "data"), str(runs / "adaptive"), *numbers])
    trained.command(equal_time.__doc__, 3, equal_time._run)
    (row,) = printed(capsys, "equal_time")
    assert row[:3] == ["adaptive", "full", "0.9"]


def test_modelopt_compares_the_same_model_on_the_same_text(chain, monkeypatch, capsys):
    """A stand-in for ModelOpt cuts nothing: its losses are those of the full model, through Megatron-Core's stock layers."""
    pruned = []

    def prune(model, constraints: dict, config: dict) -> None:
        config["forward_loop"](model)
        pruned.append(constraints["export_config"])

    with pytest.raises(FlextronError, match="modelopt: the package nvidia-modelopt is missing"):
        modelopt._run(str(chain / "parent"), str(chain / "data"))
    monkeypatch.setattr(modelopt, "_minitron", lambda: prune)
    modelopt._run(str(chain / "parent"), str(chain / "data"), samples=4, sequences=2, seq_length=16)
    rows = printed(capsys, "modelopt")
    assert rows[0][0] == "full model" and abs(float(rows[0][3])) < 2e-4
    assert {row[2] for row in rows} == {rows[0][2], "-"} and len({row[1] for row in rows}) > 3
    assert [sorted(each) for each in pruned][-1] == ["ffn_hidden_size", "hidden_size"]


@pytest.mark.parametrize(
    "arguments", [["a"], ["a", "b", "c", "round=3"], ["a", "b", "c", "rounds=-1"], ["a", "b", "c", "rounds=x"]]
)
def test_wrong_arguments_are_refused(arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", ["equal_time", *arguments])
    with pytest.raises(SystemExit, match=r"python -m benchmarks.equal_time STATIC .* sequences=, samples=, rounds="):
        trained.command(equal_time.__doc__, 3, equal_time._run)


def test_numbers_are_passed_on(monkeypatch):
    got = []

    def run(*paths: str, rounds: int = 1, samples: int = 2) -> None:
        got.append((paths, rounds, samples))

    monkeypatch.setattr("sys.argv", ["name", "a", "rounds=7", "b"])
    trained.command("usage", 2, run)
    assert got == [(("a", "b"), 7, 2)]


def test_dispatch_runs(monkeypatch, capsys):
    shape = dispatch.Shape(32, 4, 4, 2, 96)
    monkeypatch.setattr(dispatch, "SHAPES", (shape,))
    monkeypatch.setattr(dispatch, "GPU_SHAPES", (shape,))
    monkeypatch.setattr(dispatch, "ROUNDS", 2)
    dispatch.run()
    assert len(printed(capsys, "dispatch")) == 10


TINY = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 16}


@pytest.fixture
def tiny(monkeypatch):
    """Make models, batches and rounds of the benchmarks small."""
    llama = ModelConfig(**TINY, ffn_hidden_size=96)
    gpt2 = ModelConfig(
        **TINY, activation="gelu_tanh", normalization="layernorm", position_embedding_type="learned_absolute", bias=True
    )
    for module in (models, step):
        monkeypatch.setattr(module, "LENGTH", 16)
    for module in (slice, step, gradients, llama_cpp):
        monkeypatch.setattr(module, "ROUNDS", 2)
    monkeypatch.setattr(step, "LLAMA", llama)
    monkeypatch.setattr(step, "GPT2", gpt2)
    cases = {"llama": (llama, "kv_group", ("heads + ffn", slice.ALL)), "gpt2": (gpt2, "kv_group", ("hidden",))}
    monkeypatch.setattr(slice, "CASES", cases)
    monkeypatch.setattr(gradients, "MODEL", replace(llama, max_position_embeddings=gradients.LENGTH))
    monkeypatch.setattr(llama_cpp, "MODEL", replace(llama, max_position_embeddings=64))
    return llama


def test_slice_runs(tiny, capsys):
    slice.run()
    assert len(printed(capsys, "slice")) == 4 + 3 + 4


def test_step_runs(tiny, capsys):
    step.run()
    assert [row[:2] for row in printed(capsys, "step")] == [["llama", "1"], ["llama", "2"], ["gpt2", "1"], ["gpt2", "2"]]


def test_gradients_runs(tiny, monkeypatch, capsys):
    monkeypatch.setattr(gradients, "_peak", lambda fraction, padded: 0)  # peaks would need processes of their own
    gradients.run()
    assert len(printed(capsys, "gradients")) == 3


def test_llama_cpp_runs(tiny, capsys):
    pytest.importorskip("llama_cpp")
    llama_cpp.run()
    assert len(printed(capsys, "llama_cpp")) == 5


def test_a_written_llama_is_imported_and_sorted(tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 16}
    monkeypatch.setattr(stream, "HF_CONFIG", stream.HF_CONFIG | sizes | heads)
    stream.write_llama(str(tmp_path / "hf"))
    stage("import", f"hf={tmp_path}/hf", f"out={tmp_path}/imported")
    stream.sort(str(tmp_path / "imported"), str(tmp_path / "sorted"))
    assert (tmp_path / "sorted" / ".metadata").is_file()
