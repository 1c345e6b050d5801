"""Reading `family`: members and their costs, and that bad values are named."""

from __future__ import annotations

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.report.collect import collect
from flextron_mcore.report.collect_family import Family
from tests.report import synthetic


def read(run, metrics) -> Family:
    synthetic.write(run / "family", metrics)
    (found,) = collect(run).families
    return found


def test_members_are_sorted_by_size(tmp_path):
    found = read(tmp_path, synthetic.family())
    assert (found.label, found.selector, found.costs) == ("family", "router", ["parameters", "latency"])
    assert [member.budget for member in found.members] == ["0.6", "0.7", "0.8", "0.9"]
    least = found.members[0]
    assert least.subnetwork == synthetic.small(0.6) and least.depth == 4 and least.exports == {"hf": "0.6_hf"}
    assert least.costs["latency"] == (12.0, 0.6) and least.loss == pytest.approx(3.4)
    given = next(row for row in synthetic.family()["networks"] if row["budget"] == "0.6")
    assert least.to_dict() == {key: value for key, value in given.items() if key != "uniform"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("budget", 1, "'budget' must be a text, not 1"),
        ("loss", "x", "'loss' must be a number"),
        ("costs", {"parameters": {"value": 1}}, "costs: parameters: lacks 'share'"),
        ("exports", None, "'exports' must be an object, not null"),
    ],
)
def test_bad_values_are_named(tmp_path, key, value, message):
    metrics = synthetic.family()
    metrics["networks"][1][key] = value
    with pytest.raises(FlextronError) as caught:
        read(tmp_path, metrics)
    assert f"networks[1]: {message}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_family_without_members_is_named(tmp_path):
    with pytest.raises(FlextronError, match="'networks' is empty"):
        read(tmp_path, {**synthetic.family(), "networks": []})
