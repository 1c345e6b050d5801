"""Measuring latencies, with a simulated clock that only blocks move: the table has exactly the time of each block."""

from __future__ import annotations

import math

import pytest
import torch

from flextron_mcore.latency import measure as module
from flextron_mcore.latency.measure import Setting, measure, time_networks, without_drift
from flextron_mcore.latency.table import LatencyTable
from flextron_mcore.layers.state import FULL
from flextron_mcore.space import ElasticSpace
from tests import toy

PREFILL, GENERATION = Setting("prefill", 2, 16), Setting("generation", 1, 5, 4)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has a clock of its own")


@pytest.fixture
def clock(monkeypatch):
    """Function that makes a model move a simulated clock: 1 s an embedding, 1 s a head, 0.1 s a neuron."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def moved_by(model: torch.nn.Module) -> list[float]:
        def take(seconds):
            now[0] += seconds

        model.embedding.register_forward_hook(lambda *_: take(1.0))
        for layer in model.decoder.layers:
            layer.self_attention.register_forward_hook(lambda own, *_: take(math.prod(own.layout.used(own.state.widths))))
            layer.mlp.register_forward_hook(lambda own, *_: take(0.1 * own.used(own.state.widths)))
        return now

    return moved_by


def test_freed_memory_is_kept_while_measuring(monkeypatch):
    called = []
    monkeypatch.setattr(module, "keep_freed_memory", lambda: called.append(True))
    arch = toy.config()
    module.runner(toy.model(arch, ElasticSpace.build(arch)), PREFILL, arch.vocab_size, 0)
    assert called


@pytest.mark.parametrize("setting, passes", [(PREFILL, 1), (GENERATION, 4)], ids=["prefill", "generation"])
@pytest.mark.parametrize("groups, unit", [(4, "kv_group"), (2, "query_head")])
def test_the_table_has_what_the_blocks_took(clock, setting, passes, groups, unit):
    arch = toy.config(num_layers=3, num_query_groups=groups)
    space = ElasticSpace.build(arch, attention_unit=unit, heads=[0.5, 1.0])
    model = toy.model(arch, space)
    clock(model)
    networks = []
    table = measure(model, arch, space, setting, 2, 5, seed=1, progress=lambda: networks.append(1))
    timings = table.timings[arch.hidden_size]
    assert timings.constant.median == pytest.approx(1000 * passes)
    assert [t.median for t in timings.candidates["heads"]] == pytest.approx([1000 * passes * size for size in space.heads])
    assert [t.minimum for t in timings.candidates["ffn_hidden_size"]] == pytest.approx(
        [100 * passes * width for width in space.ffn_hidden_size]
    )
    assert table.check["networks"] == 5 and table.check["largest_error"] == pytest.approx(0, abs=1e-9)
    assert table.warning() is None
    assert len(networks) == 3 * (4 + 5)
    assert all(layer.state is FULL and not layer._forward_hooks for layer in model.decoder.layers)


def test_whole_networks_are_timed_in_turn(clock):
    arch = toy.config(num_layers=3)
    space = ElasticSpace.build(arch)
    model = toy.model(arch, space)
    clock(model)
    networks = [toy.random_network(arch, space, 1), None, toy.random_network(arch, space, 2)]
    found = time_networks(model, arch, networks, GENERATION, rounds=2, seed=0)
    for net, timing in zip(networks, found, strict=True):
        layers = (net or space.uniform(arch, 4, 48)).layers
        expected = 4000 * (1 + sum(layer.num_attention_heads + 0.1 * layer.ffn_hidden_size for layer in layers))
        assert (timing.minimum, timing.median) == pytest.approx((expected, expected))
    assert all(layer.state is FULL for layer in model.decoder.layers)


def test_sums_that_are_wrong_are_reported(clock):
    """Whole networks take 20 s more than the sum of their blocks: the check reports the error."""
    arch = toy.config()
    space = ElasticSpace.build(arch)
    model = toy.model(arch, space)
    now = clock(model)
    slow = lambda *_: now.__setitem__(0, now[0] + (0 if model.decoder.layers[0]._forward_hooks else 20))  # noqa: E731
    model.output_layer.register_forward_hook(slow)
    table = measure(model, arch, space, PREFILL, 1, 4, seed=1)
    assert table.check["median_error"] > 0.1 and "measure again on an idle machine" in table.warning()


def test_the_machine_is_named(tmp_path, clock):
    import json

    arch = toy.config()
    space = ElasticSpace.build(arch)
    model = toy.model(arch, space)
    clock(model)
    table = measure(model, arch, space, PREFILL, 1, 0, seed=1)
    assert table.check == {} and table.machine["dtype"] == "float32" and "cores" in table.machine["device"]
    (tmp_path / "t.json").write_text(json.dumps(table.to_dict()))
    assert LatencyTable.from_file(tmp_path / "t.json", arch, space) == table


def test_a_slow_round_does_not_count():
    """Rounds at 1, 3 and 1.5 times the true times are all scaled to the median round. An interruption of one entry stays."""
    true = {"a": [1.0, 1.2], "b": [5.0], "c": [7.0], "d": [2.0, 2.0]}
    rounds = [{key: [slow * value for value in values] for key, values in true.items()} for slow in (1.0, 3.0, 1.5)]
    rounds[2]["b"] = [50.0]
    found = without_drift(rounds)
    for key in "acd":
        assert found[key] == pytest.approx([1.5 * value for value in true[key] * 3])  # scaled to the median round
    assert found["b"] == pytest.approx([7.5, 7.5, 50.0])
