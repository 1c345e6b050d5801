"""Reading values: what each method takes, and that the line of an error names file, key and value."""

from __future__ import annotations

import math

import pytest

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.report.reader import Reader, read_model, read_settings, read_subnetwork
from flextron_mcore.space import SubNetwork

MODEL = ModelConfig(2, 16, 2, 64, 32)


def reader(**values) -> Reader:
    return Reader(values, "m.json")


def test_good_values():
    values = reader(yes=True, word="b", words=["x", "y"], row=[1, 2.5], none=None, number=3, nan=math.nan)
    assert values.flag("yes") is True and values.choice("word", ("a", "b")) == "b" and values.texts("words") == ["x", "y"]
    assert values.number_list("row") == values.number_list("row", 2) == [1.0, 2.5]
    assert [values.maybe(key) for key in ("none", "missing", "number")] == [None, None, 3.0]
    assert math.isnan(values.maybe("nan")) and values.has("number") and not values.has("none")


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (lambda r: r.flag("key"), 1, "m.json: 'key' must be true or false, not 1"),
        (lambda r: r.choice("key", ("a", "b")), "c", "m.json: 'key' must be one of a, b, not \"c\""),
        (lambda r: r.choice("key", ("a", "b")), ["a"], "m.json: 'key' must be one of a, b, not [\"a\"]"),
        (lambda r: r.texts("key"), ["a", 1], "m.json: 'key' must be a list of texts, not [\"a\", 1]"),
        (lambda r: r.number_list("key"), [1, "2"], "m.json: 'key' must be a list of numbers, not [1, \"2\"]"),
        (lambda r: r.number_list("key", 2), [1], "m.json: 'key' must be a list of 2 numbers, not [1]"),
        (lambda r: r.maybe("key"), "x", "m.json: 'key' must be a number, not \"x\""),
        (lambda r: r.rows("key")[1].whole("n"), [{}, {"n": 1.5}], "m.json: key[1]: 'n' must be a whole number, not 1.5"),
    ],
)
def test_bad_values_are_named(read, value, message):
    with pytest.raises(FlextronError) as caught:
        read(reader(key=value))
    assert str(caught.value) == message


def test_model_and_subnetwork():
    row = reader(subnetwork=SubNetwork.full(MODEL).to_dict(), model=MODEL.to_dict())
    assert read_model(row) == MODEL and read_subnetwork(row, MODEL) == SubNetwork.full(MODEL)
    assert read_settings(row).space is None and read_settings(row).model == MODEL.to_dict()
    with pytest.raises(FlextronError, match="^m.json: 2 layers, but the model has 3$"):
        read_subnetwork(row, ModelConfig(3, 16, 2, 64, 32))
    with pytest.raises(FlextronError, match="^m.json: model: "):
        read_model(reader(model={"num_layers": 0}))
