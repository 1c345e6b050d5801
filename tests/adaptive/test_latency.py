"""Latency of token-routed blocks: the fit of its costs, and the part of the latency table that holds them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from flextron_mcore.adaptive import latency as routed
from flextron_mcore.adaptive.table import RoutedTable, routed_warning, token_cost
from flextron_mcore.adaptive.usage import TokenCost
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Cost, parameter_cost
from flextron_mcore.digests import seal
from flextron_mcore.latency.measure import Setting
from flextron_mcore.latency.table import LatencyTable
from flextron_mcore.layers.state import FULL
from flextron_mcore.settings.sections import KV_POLICIES
from flextron_mcore.space import SubNetwork
from tests import toy
from tests.routing_toy import family, latency, write_table


@pytest.mark.parametrize("kind", ["prefill", "generation"])
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_measured_costs_of_token_routing(kind, kv_policy):
    choices = family(2)
    model, calls = toy.model(choices.model, choices.space), []
    setting = Setting(kind, 2, 8, 4 if kind == "generation" else 1)
    found = routed.measure_routed(model, choices, setting, 2, 8, kv_policy, latency(choices), 0, lambda: calls.append(1))
    assert len(calls) == 3 * routed.networks_per_round(choices)
    assert [len(costs) for costs in found.levels.values()] == [4, 4]
    assert [len(costs) for costs in found.overhead.values()] == [3, 3]
    assert min(cost for part in (found.levels, found.overhead) for costs in part.values() for cost in costs) >= 0
    assert max(found.levels["heads"]) > 0 and found.check["median_error"] >= 0 and found.hidden_size == 8
    assert all(layer.state is FULL for layer in model.decoder.layers)


@pytest.mark.parametrize("setting", [Setting("prefill", 2, 8), Setting("generation", 2, 8, 4)], ids=lambda setting: setting.kind)
def test_costs_of_levels_are_found(setting, monkeypatch):
    """The fit finds the costs of a simulated clock.

    A block takes its levels' costs, weighted by the shares of tokens at them: attention 1, 2, 3, 4 ms, MLP 2, 3, 5, 9 ms. Where
    the prompt's tokens differ it takes 0.5 (attention) or 3 ms (MLP) more, as much again for each further level, and 2 or 0.1 ms
    times the part of the block above a token's own level. The clock runs at half the speed of the table's machine.
    """
    choices = family(2)
    costs, overhead = np.array([[1.0, 2, 3, 4], [2, 3, 5, 9]]), ((0.5, 0.5, 2.0), (3.0, 3.0, 0.1))
    model = toy.model(choices.model, choices.space)

    def parts(model) -> list[float]:
        found = []
        for layer in model.decoder.layers:
            routing = layer.state.routing
            for axis, block in enumerate(routing.blocks.values()):
                levels = block.fixed.levels_NSB[block.block]
                sizes = np.array([choices.space.heads, choices.space.ffn_hidden_size][axis])
                first = levels[:8].numpy()
                further = len(np.unique(first)) - 1
                above = (sizes[first.max()] - sizes[first].mean()) / sizes[-1]
                found.append(float(costs[axis][levels.numpy()].mean()) + np.dot(overhead[axis], [further > 0, further, above]))
        return found

    candidates = dict(zip(("heads", "ffn_hidden_size"), costs.tolist(), strict=True))
    static = Cost("latency", choices.model, choices.space, 7.0, candidates)

    def whole(run) -> float:
        if model.decoder.layers[0].state.routing:
            return 7.0 + sum(parts(model))
        return 7.0 + sum(static.layer(layer.state.widths or full) for layer in model.decoder.layers)

    full = SubNetwork.full(choices.model).layers[0]
    monkeypatch.setattr(routed, "time_blocks", lambda model, run: ([2 * part for part in parts(model)], 14.0))
    monkeypatch.setattr(routed, "time_run", lambda run: 2 * whole(run))
    found = routed.measure_routed(model, choices, setting, 1, 8, "full", static, 0)
    assert [list(found) for found in found.levels.values()] == [pytest.approx(costs[0]), pytest.approx(costs[1])]
    assert list(found.overhead.values()) == [pytest.approx(overhead[0]), pytest.approx(overhead[1])]
    assert found.check["largest_error"] < 1e-9


def test_the_table_keeps_costs_of_token_routing(tmp_path):
    choices = family(2)
    toy_run = tmp_path / "run"
    from flextron_mcore.checkpoint.store import CheckpointInfo

    toy.write(toy.model(choices.model, choices.space), CheckpointInfo(choices.model, choices.space), toy_run)
    file = write_table(toy_run, tmp_path / "latency.json")
    values = json.loads(file.read_text())
    assert values["routed"] == {}
    levels = {"heads": (1.0, 2.0, 3.0, 4.0), "ffn_hidden_size": (2.0, 3.0, 4.0, 5.0)}
    overhead = {"heads": (0.5, 0.25, 1.0), "ffn_hidden_size": (0.0, 0.1, 0.0)}
    part = RoutedTable(8, levels, overhead, {"median_error": 0.01})
    row = json.loads(json.dumps(part.to_dict()))
    file.write_text(json.dumps(seal({**values, "routed": {"own": row}})))
    table = LatencyTable.from_file(file, choices.model, choices.space)
    assert RoutedTable.read(table, "own") == part and RoutedTable.read(table, "full") is None
    file.write_text(json.dumps(table.to_dict()))
    assert LatencyTable.from_file(file, choices.model, choices.space) == table
    cost = token_cost(table.cost(), table, "own")
    assert (cost.overhead, cost.tokens) == (overhead, 8) and cost.levels.full == table.cost().constant + 2 * 9
    for other in (token_cost(table.cost(), table, "full"), token_cost(table.cost(), None, "own")):
        assert other == TokenCost(table.cost())
    parameters = parameter_cost(choices.model, choices.space)
    assert token_cost(parameters, table, "own") == TokenCost(parameters)
    older = {key: value for key, value in row.items() if key != "overhead"}
    for bad in ({**row, "levels": {**levels, "heads": [1, 2]}}, older, {**row, "hidden_size": "wide"}):
        with pytest.raises(FlextronError, match="the table's part routed.own cannot be read .* measure it again"):
            RoutedTable.read(replace(table, routed={"own": bad}), "own")


def test_a_table_says_when_its_routed_part_should_not_be_trusted():
    choices = family(2)
    costs = {axis: (1.0,) * 4 for axis in ("heads", "ffn_hidden_size")}
    overhead = {axis: (0.0,) * 3 for axis in costs}
    parts = {p: RoutedTable(8, costs, overhead, {"median_error": e}).to_dict() for p, e in (("full", 0.03), ("own", 0.6))}
    table = LatencyTable(choices.model, choices.space, {}, {}, "median", {}, routed=parts)
    assert routed_warning(table, "full") is None
    assert re.search(r"\(kv_policy=own\) are off by 60.0% of .* more routed.rounds", routed_warning(table, "own"))
    assert "its overhead is not counted: measure it" in routed_warning(replace(table, routed={}), "own")
