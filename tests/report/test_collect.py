"""Reading run directories: what is found, which evaluation is which, and that bad files are named in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.report.collect import collect
from flextron_mcore.space import SubNetwork

MODEL = ModelConfig(2, 16, 2, 64, 32)
NETWORK = {
    "name": "full",
    "subnetwork": SubNetwork.full(MODEL).to_dict(),
    **{"parameters": 10, "non_embedding_parameters": 5, "weight_bytes": 20, "kv_cache_bytes": 8},
    **{"loss": {"prose": 2.0}, "perplexity": {"prose": 7.4}, "mean": {"loss": 2.0, "perplexity": 7.4}},
}
EVALUATE = {"stage": "evaluate", "networks": [NETWORK], "model": MODEL.to_dict(), "space": None}
ELASTIC = {"stage": "elastic", "steps": 4, "tokens": 400, "seconds": 1.5, "tokens_per_second": 266.7, "validation": {}}
EXPORT = {
    "stage": "export",
    "format": "hf",
    "architecture": "A",
    "parameters": 1,
    "bytes": 2,
    "path": "x",
    "max_logit_difference": None,
}


def put(run: Path, name: str, metrics: Any, log: str | None = None) -> None:
    (run / name).mkdir(parents=True)
    content = metrics if isinstance(metrics, bytes) else json.dumps(metrics).encode()
    (run / name / "metrics.json").write_bytes(content)
    if log is not None:
        (run / name / "log.jsonl").write_text(log, encoding="utf-8")


def problem(run: Path) -> str:
    with pytest.raises(FlextronError) as caught:
        collect(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_stage_says_what_was_looked_for(tmp_path):
    assert "no such directory" in problem(tmp_path / "missing")
    (tmp_path / "notes").mkdir()
    put(tmp_path, "latency", {"stage": "latency"})
    message = problem(tmp_path)
    assert (
        "metrics.json" in message and "elastic, router, joint, gumbel, sensitivity, evaluate, compare, family, export" in message
    )


@pytest.mark.parametrize("text", [b'{"stage": "elastic", ', b"", b"[1, 2]", b"{}", b'{"stage": 3}', b"\xff"])
def test_unreadable_metrics_name_the_file(tmp_path, text):
    put(tmp_path, "elastic", text)
    assert problem(tmp_path).startswith(str(tmp_path / "elastic" / "metrics.json"))


@pytest.mark.parametrize(
    ("base", "path", "value"),
    [
        (EVALUATE, ["networks"], {}),
        (EVALUATE, ["networks"], []),
        (EVALUATE, ["model"], None),
        (EVALUATE, ["model", "num_layers"], 0),
        (EVALUATE, ["model", "num_layers"], 3),
        (EVALUATE, ["networks", 0, "mean", "loss"], "2.0"),
        (EVALUATE, ["networks", 0, "loss", "prose"], None),
        (EVALUATE, ["networks", 0, "parameters"], 1.5),
        (EVALUATE, ["networks", 0, "subnetwork", "layers", 0, "kv_groups"], "2"),
        (ELASTIC, ["steps"], True),
        (ELASTIC, ["space"], [1]),
        (EXPORT, ["max_logit_difference"], "small"),
        ({"stage": "prepare", "vocab_size": 3, "domains": {"a": {}}}, ["domains", "a", "bytes"], 4),
        ({"stage": "importance", "samples": 1, "score": "s", "ablation": [{}]}, ["ablation", 0, "setup"], "50% heads"),
    ],
)
def test_wrong_values_name_the_file(tmp_path, base, path, value):
    metrics = copy.deepcopy(base)
    inner = metrics
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    put(tmp_path, "stage", metrics)
    assert problem(tmp_path).startswith(str(tmp_path / "stage" / "metrics.json") + ": ")


@pytest.mark.parametrize("key", ["steps", "tokens", "seconds", "tokens_per_second"])
def test_missing_key_is_named(tmp_path, key):
    put(tmp_path, "elastic", {k: v for k, v in ELASTIC.items() if k != key})
    assert problem(tmp_path) == f"{tmp_path / 'elastic' / 'metrics.json'}: lacks '{key}'"


def test_half_a_log_line_is_named(tmp_path):
    put(tmp_path, "elastic", ELASTIC, '{"step": 1, "event": "train", "loss": 3.0}\n{"step": 2, "ev')
    assert problem(tmp_path).startswith(f"{tmp_path / 'elastic' / 'log.jsonl'}: line 2 ")


def test_a_resumed_log_counts_the_later_row_of_a_step(tmp_path):
    rows = [(1, 5.0), (2, 4.0), (3, 9.0), (2, 3.5), (3, 3.0)]
    lines = [json.dumps({"step": s, "event": "train", "loss": v, "subnetwork_losses": [v + 1]}) for s, v in rows]
    lines += [json.dumps({"step": s, "event": "validation", "losses": {"full": v}}) for s, v in ((0, 6.0), (3, 3.1))]
    put(tmp_path, "elastic", ELASTIC, "\n".join([*lines, json.dumps({"event": "checkpoint"}), ""]))
    training = collect(tmp_path).training[0]
    assert training.train == [(1, 5.0, [6.0]), (2, 3.5, [4.5]), (3, 3.0, [4.0])]
    assert (training.first_loss, training.last_loss) == (6.0, 3.1)


def test_stage_without_a_log_takes_validation_from_metrics(tmp_path):
    put(tmp_path, "elastic", {**ELASTIC, "validation": {"first": {"losses": {"full": 5.0}}, "last": {"full": 4.0}}})
    training = collect(tmp_path).training[0]
    assert (training.train, training.first_loss, training.last_loss) == ([], 5.0, 4.0)


@pytest.mark.parametrize(
    ("directories", "family", "before"),
    [
        (["evaluate"], "evaluate", None),
        (["evaluate_parent"], "evaluate_parent", None),
        (["evaluate", "evaluate_parent"], "evaluate", "evaluate_parent"),
        (["before", "evaluate", "evaluate_router"], "evaluate", "before"),
        (["evaluate_1", "evaluate_2"], "evaluate_2", None),
        (["family", "parent"], "family", "parent"),
    ],
)
def test_which_evaluation_is_which(tmp_path, directories, family, before):
    for name in directories:
        put(tmp_path, name, EVALUATE)
    run = collect(tmp_path)
    assert run.family().label == family
    assert (run.before().label if run.before() else None) == before
    assert [series.label for series in run.series] == directories


def test_settings_come_from_the_family_then_from_training(tmp_path):
    put(tmp_path, "pretrain", {**ELASTIC, "stage": "pretrain", "model": {"from": "pretrain"}, "space": {"from": "pretrain"}})
    put(tmp_path, "elastic", {**ELASTIC, "model": {"from": "elastic"}})
    assert collect(tmp_path).settings().model == {"from": "elastic"}
    assert collect(tmp_path).settings().space == {"from": "pretrain"}
    put(tmp_path, "evaluate", EVALUATE)
    assert collect(tmp_path).settings().model == MODEL.to_dict()


def test_paths_inside_the_run_are_shown_relative_to_it(tmp_path):
    put(tmp_path, "export", {**EXPORT, "path": str(tmp_path.resolve() / "export" / "model")})
    put(tmp_path, "export_2", {**EXPORT, "path": "/elsewhere/model"})
    assert [export.path for export in collect(tmp_path).exports] == ["export/model", "/elsewhere/model"]
