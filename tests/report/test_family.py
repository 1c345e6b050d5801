"""The topic about `family`: members and their costs, the table, the pictures, and that bad values are named."""

from __future__ import annotations

import pytest

from flextron_mcore.report import family
from flextron_mcore.report.family import loss_pictures
from tests.report import synthetic


def read(run, metrics) -> family.Family:
    return synthetic.read(family.TOPIC, run, family=metrics)[0]


def test_members_are_sorted_by_size(tmp_path):
    found = read(tmp_path, synthetic.family())
    assert (found.label, found.selector, found.costs) == ("family", "router", ["parameters", "latency"])
    assert [member.budget for member in found.networks] == ["0.6", "0.7", "0.8", "0.9"]
    least = found.networks[0]
    assert least.subnetwork == synthetic.small(0.6) and least.subnetwork.depth == 4 and least.exports == {"hf": "0.6_hf"}
    assert least.costs["latency"] == family.MemberCost(12.0, 0.6) and least.loss == pytest.approx(3.4)
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
    synthetic.write(tmp_path / "family", synthetic.changed(synthetic.family(), ["networks", 1, key], value))
    assert f"networks[1]: {message}" in synthetic.problem(tmp_path)


def test_a_family_without_members_is_named(tmp_path):
    synthetic.write(tmp_path / "family", {**synthetic.family(), "networks": []})
    assert synthetic.problem(tmp_path).endswith("'networks' is empty")


def test_a_row_a_budget(tmp_path, undrawn):
    (part,) = family.sections([read(tmp_path, synthetic.family())])
    (table,) = part.tables
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert (row["Budget"], row["Latency (ms)"], row["Mean loss"]) == ("0.6", "12 (60.0%)", "3.400")
    assert (row["Hidden of 256"], row["Layers of 8"], row["Exports"]) == ("128", "4", "hf")
    assert [picture.name for picture in part.pictures] == ["family_loss_parameters", "family_loss_latency", "family_widths"]
    assert part.pictures[-1].alt.endswith("0/0, 0/0, 0/0, 0/0.")


def test_several_have_their_labels_and_losses_may_be_missing(tmp_path, undrawn):
    stages = {"one": synthetic.family(), "two": synthetic.family(latency=False, losses=False)}
    first, second = family.sections(synthetic.read(family.TOPIC, tmp_path, **stages))
    assert (first.key, second.key, second.title) == ("models", "models2", "A model for every budget (two)")
    assert second.tables[0].rows[0][2] == "–" and [picture.name for picture in second.pictures] == ["two_widths"]


def test_loss_against_parameters_and_latency(tmp_path):
    parameters, latency = loss_pictures(read(tmp_path, synthetic.family()))
    assert (parameters.name, latency.name) == ("family_loss_parameters", "family_loss_latency")
    assert "against latency (ms), by budget: 0.6: 3.400 at 12, 0.7: 3.300 at 14" in latency.alt
    assert "parameters (millions)" in parameters.alt


@pytest.mark.parametrize(("options", "names"), [({"latency": False}, ["family_loss_parameters"]), ({"losses": False}, [])])
def test_what_is_not_known_is_not_drawn(tmp_path, options, names):
    assert [picture.name for picture in loss_pictures(read(tmp_path, synthetic.family(**options)))] == names


def test_a_diverged_network_is_left_out(tmp_path):
    metrics = synthetic.family()
    metrics["networks"][0]["loss"] = float("nan")
    assert "0.9" not in loss_pictures(read(tmp_path, metrics))[1].alt
