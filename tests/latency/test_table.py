"""Latency tables: files, sums, fits, refusals."""

from __future__ import annotations

import json
import random

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.latency.table import LatencyTable, Timing, Timings, check_errors, fit
from flextron_mcore.space import ElasticSpace
from tests import toy

ARCH = toy.config(num_layers=3)
SPACE = ElasticSpace.build(ARCH, heads=[0.5, 1.0])


def table(**changes) -> LatencyTable:
    timings = [Timing(value, 1.5 * value) for value in (1.0, 2.0, 3.0, 0.5, 1.0, 1.5, 2.0)]
    values = dict(
        model=ARCH,
        space=SPACE,
        setting={"kind": "prefill", "batch_size": 2, "sequence_length": 24},
        machine={"device": "abacus"},
        statistic="minimum",
        timings={ARCH.hidden_size: Timings(timings[0], {"heads": tuple(timings[1:3]), "ffn_hidden_size": tuple(timings[3:])})},
    )
    return LatencyTable(**{**values, **changes})


def test_a_table_is_read_back_and_its_costs_are_sums(tmp_path):
    file = tmp_path / "latency.json"
    for made in (table(), table(statistic="median", check={"networks": 3, "median_error": 0.01, "p95_error": 0.02})):
        file.write_text(json.dumps(made.to_dict()))
        assert LatencyTable.from_file(file, ARCH, SPACE) == made
    assert table().cost().full == 1 + 3 * (3 + 2) and table().cost().smallest == 1 + 3 * (2 + 0.5)
    assert table(statistic="median").cost().full == 1.5 * 16
    written = table().to_dict()
    assert written["full_model_ms"] == 16 and written["attention"][0] == {
        "kv_groups": 2, "query_heads_per_group": 1, "minimum_ms": 2.0, "median_ms": 3.0,
    }  # fmt: skip


def test_a_table_says_when_it_should_not_be_trusted():
    assert table().warning() == "it was not checked against whole networks"
    assert table(check={"median_error": 0.03, "p95_error": 0.08}).warning() is None
    for check in ({"median_error": 0.031, "p95_error": 0.05}, {"median_error": 0.01, "p95_error": 0.09}):
        assert "measure again on an idle machine" in table(check=check).warning()


def test_a_smaller_space_can_use_the_table(tmp_path):
    file = tmp_path / "latency.json"
    file.write_text(json.dumps(table().to_dict()))
    small = ElasticSpace.build(ARCH, heads=[1.0], ffn_hidden_size=[0.5, 1.0])
    assert LatencyTable.from_file(file, ARCH, small).cost().smallest == 1 + 3 * (3 + 1)
    large = ElasticSpace.build(ARCH, heads=[0.25, 0.5, 1.0])
    with pytest.raises(FlextronError, match=r"lacks the candidates \[1\] of space.heads: measure a table of this checkpoint"):
        LatencyTable.from_file(file, ARCH, large)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v.update(format=9), "a latency table of format 9, not 1: measure again"),
        (lambda v: v["model"].update(num_layers=4), "is the latency table of another model"),
        (lambda v: v.pop("constant"), r"is not a latency table \(lacks 'constant'\)"),
        (lambda v: v["mlp"][0].update(minimum_ms=float("nan")), "is not a latency table"),
        (lambda v: v["mlp"][0].update(minimum_ms="fast"), "is not a latency table"),
        (lambda v: v.update(statistic="mean"), "statistic 'mean' is not known: use one of minimum, median"),
    ],
)
def test_tables_of_another_model_or_space_are_refused(tmp_path, change, message):
    values = table().to_dict()
    change(values)
    (tmp_path / "t.json").write_text(json.dumps(values))
    with pytest.raises(FlextronError, match=message) as error:
        LatencyTable.from_file(tmp_path / "t.json", ARCH, SPACE)
    assert "t.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "", "[1]", '{"format": 1'])
def test_other_files_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(FlextronError, match="t.json: is not a latency table"):
        LatencyTable.from_file(tmp_path / "t.json", ARCH, SPACE)


def test_a_fit_finds_the_sums_again():
    truth, noise = table().cost(), random.Random(0)
    networks = [toy.random_network(ARCH, SPACE, seed) for seed in range(60)]
    exact = fit(ARCH, SPACE, [(net, truth.of(net)) for net in networks[:30]], {}, {})
    for net in networks:
        assert exact.cost().of(net) == pytest.approx(truth.of(net))
    assert exact.check["largest_error"] < 1e-9 and exact.warning() is None
    rough = fit(ARCH, SPACE, [(net, truth.of(net) * noise.uniform(0.99, 1.01)) for net in networks], {}, {})
    assert 0 < check_errors(rough.cost(), [(net, truth.of(net)) for net in networks])["largest_error"] < 0.01


def test_every_hidden_size_has_its_own_entries(tmp_path):
    """A table over all axes is fitted, written and read back. With elastic depth, the smallest heads include a layer's cost."""
    space = ElasticSpace.build(ARCH, heads=[0.5, 1.0], hidden_size=[8, 16, 32], depth=[1, 2, 3])
    timings = {}
    for size in space.hidden_size:
        values = [Timing(size * value, size * value) for value in (1.0, 2.5, 3.0, 0.0, 1.0, 1.5, 2.0 + size)]
        timings[size] = Timings(values[0], {"heads": tuple(values[1:3]), "ffn_hidden_size": tuple(values[3:])})
    truth = table(space=space, timings=timings)
    networks = [toy.random_network(ARCH, space, seed) for seed in range(120)]
    assert truth.cost().smallest == min(map(truth.cost().of, networks)) == 8 * (1 + 2.5)
    fitted = fit(ARCH, space, [(net, truth.cost().of(net)) for net in networks[:80]], {}, {})
    (tmp_path / "t.json").write_text(json.dumps(fitted.to_dict()))
    read = LatencyTable.from_file(tmp_path / "t.json", ARCH, space)
    for net in networks:
        assert fitted.cost().of(net) == pytest.approx(truth.cost().of(net))
    assert read == fitted
    with pytest.raises(FlextronError, match=r"lacks the candidates \[24\] of space.hidden_size"):
        LatencyTable.from_file(tmp_path / "t.json", ARCH, ElasticSpace.build(ARCH, heads=[0.5, 1.0], hidden_size=[24, 32]))
    with pytest.raises(FlextronError, match=r"do not determine the 18 entries .* at each of the hidden sizes \[8, 16, 32\]"):
        fit(ARCH, space, [(net, 1.0) for net in networks[:5]], {}, {})


def test_too_few_measurements_are_refused():
    uniform = [(SPACE.uniform(ARCH, heads, 48), 1.0) for heads in SPACE.heads]
    with pytest.raises(FlextronError, match="2 measured networks do not determine the 5 entries of the table"):
        fit(ARCH, SPACE, uniform, {}, {})
