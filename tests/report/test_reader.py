"""Reading values and run directories; a refusal names file, key and value."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.report import TOPICS
from flextron_mcore.report.reader import STAGES, Reader, Settings, collect
from flextron_mcore.space import SubNetwork
from tests.report import synthetic
from tests.report.synthetic import ELASTIC, EVALUATE, EXPORT

MODEL = ModelConfig(2, 16, 2, 64, 32)


@dataclass(frozen=True)
class Part:
    n: int


@dataclass(frozen=True)
class Whole:
    label: str
    name: str
    sizes: dict[str, Part]
    rows: list[Part]
    missing: float | None


def reader(**values) -> Reader:
    return Reader(values, "m.json")


def test_good_values_are_read():
    values = reader(yes=True, word="b", words=["x", "y"], row=[1, 2.5], none=None, number=3, nan=math.nan)
    assert values.read("yes", bool) is True and values.read("word", Literal["a", "b"]) == "b"
    assert values.read("words", list[str]) == ["x", "y"] and values.read("row", list[float]) == [1.0, 2.5]
    assert values.read("row", tuple[float, float]) == (1.0, 2.5)
    assert [values.read(key, float | None) for key in ("none", "missing", "number")] == [None, None, 3.0]
    assert math.isnan(values.read("nan", float | None)) and values.has("number") and not values.has("none")


def test_dataclasses_are_read_by_their_fields():
    values = reader(name="it", sizes={"a": {"n": 1}}, rows=[{"n": 2, "more": 3}, {"n": 4}], label="not read")
    assert values.into(Whole, label="given") == Whole("given", "it", {"a": Part(1)}, [Part(2), Part(4)], None)
    with pytest.raises(FlextronError, match=r"^m.json: rows\[1\]: lacks 'n'$"):
        reader(name="it", sizes={}, rows=[{"n": 2}, {}]).into(Whole, label="given")


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (lambda r: r.read("key", bool), 1, "m.json: 'key' must be true or false, not 1"),
        (lambda r: r.read("key", Literal["a", "b"]), "c", "m.json: 'key' must be one of a, b, not \"c\""),
        (lambda r: r.read("key", Literal["a", "b"]), ["a"], "m.json: 'key' must be one of a, b, not [\"a\"]"),
        (lambda r: r.read("key", list[str]), ["a", 1], "m.json: 'key' must be a list of texts, not [\"a\", 1]"),
        (lambda r: r.read("key", list[float]), [1, "2"], "m.json: 'key' must be a list of numbers, not [1, \"2\"]"),
        (lambda r: r.read("key", tuple[float, float]), [1], "m.json: 'key' must be a list of 2 numbers, not [1]"),
        (lambda r: r.read("key", float | None), "x", "m.json: 'key' must be a number, not \"x\""),
        (lambda r: r.rows("key")[1].read("n", int), [{}, {"n": 1.5}], "m.json: key[1]: 'n' must be a whole number, not 1.5"),
    ],
)
def test_bad_values_are_named(read, value, message):
    with pytest.raises(FlextronError) as caught:
        read(reader(key=value))
    assert str(caught.value) == message


def test_models_and_sub_networks_are_read():
    row = reader(subnetwork=SubNetwork.full(MODEL).to_dict(), model=MODEL.to_dict())
    assert row.read("model", ModelConfig) == MODEL and row.read("subnetwork", SubNetwork) == SubNetwork.full(MODEL)
    assert row.into(Settings) == Settings(MODEL.to_dict(), None)
    with pytest.raises(FlextronError, match="^m.json: 2 layers, but the model has 3$"):
        replace(row, model=ModelConfig(3, 16, 2, 64, 32)).read("subnetwork", SubNetwork)
    with pytest.raises(FlextronError, match="^m.json: model: "):
        reader(model={"num_layers": 0}).with_model()


def test_no_stage_says_what_was_looked_for(tmp_path):
    assert "no such directory" in synthetic.problem(tmp_path / "missing")
    (tmp_path / "notes").mkdir()
    synthetic.write(tmp_path / "latency", {"stage": "latency"})
    message = synthetic.problem(tmp_path)
    assert "metrics.json" in message and ", ".join(STAGES) in message


def test_stages_of_all_topics_are_read():
    """Stages of all topics are read: the report would leave out a topic whose stage is not among STAGES without a word."""
    assert {stage for topic in TOPICS for stage in topic.stages} <= set(STAGES)


def test_stages_are_in_the_order_of_a_run(tmp_path):
    for name, stage in (
        ("b", "evaluate"),
        ("a", "export"),
        ("c", "evaluate"),
        ("d", "pretrain"),
        (".e", "elastic"),
        ("f", "serve"),
    ):
        synthetic.write(tmp_path / name, {"stage": stage})
    assert [output.label for output in collect(tmp_path)] == ["d", "b", "c", "a"]


@pytest.mark.parametrize("text", [b'{"stage": "elastic", ', b"", b"[1, 2]", b"{}", b'{"stage": 3}', b"\xff"])
def test_unreadable_metrics_name_the_file(tmp_path, text):
    (tmp_path / "elastic").mkdir()
    (tmp_path / "elastic" / "metrics.json").write_bytes(text)
    assert synthetic.problem(tmp_path).startswith(str(tmp_path / "elastic" / "metrics.json"))


@pytest.mark.parametrize(
    ("metrics", "path", "value"),
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
        ({"stage": "import"}, ["model"], 1),
        ({"stage": "prepare", "vocab_size": 3, "domains": {"a": {}}}, ["domains", "a", "bytes"], 4),
        ({"stage": "importance", "samples": 1, "score": "s", "ablation": [{}]}, ["ablation", 0, "setup"], "50% heads"),
    ],
)
def test_wrong_values_name_the_file(tmp_path, metrics, path, value):
    synthetic.write(tmp_path / "stage", synthetic.changed(metrics, path, value))
    assert synthetic.problem(tmp_path).startswith(str(tmp_path / "stage" / "metrics.json") + ": ")


@pytest.mark.parametrize("key", ["steps", "tokens", "seconds", "tokens_per_second"])
def test_missing_key_is_named(tmp_path, key):
    synthetic.write(tmp_path / "elastic", {k: v for k, v in ELASTIC.items() if k != key})
    assert synthetic.problem(tmp_path) == f"{tmp_path / 'elastic' / 'metrics.json'}: lacks '{key}'"
