"""An axis added by one record and one layer module (tests/toy_axis.py) works in every stage, from sampling to export.

What its module computes is tested in tests/layers/test_added_block.py.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from flextron_mcore.axes import AXES
from flextron_mcore.checkpoint.reader import TensorReader, load_model
from flextron_mcore.checkpoint.store import CheckpointInfo, iteration_path, open_checkpoint
from flextron_mcore.checkpoint.writer import write_streaming
from flextron_mcore.choices import Choices
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget, memory_cost, parameter_cost
from flextron_mcore.evaluation.family import uniform_family
from flextron_mcore.exports.cut import cut, cut_config
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.latency.measure import Setting, measure
from flextron_mcore.latency.table import LatencyTable
from flextron_mcore.layers.weighted import WeightedNetwork
from flextron_mcore.model import build_model
from flextron_mcore.report.networks import describe, layer_columns
from flextron_mcore.routers.store import RouterInfo
from flextron_mcore.selection.selectors import Sensitivity, Uniform
from flextron_mcore.settings.sections import GumbelSettings, RouterSettings, SurrogateSettings
from flextron_mcore.sorting.importance import importance
from flextron_mcore.sorting.permutation import order, sorted_tensors
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters
from flextron_mcore.training.gumbel import GumbelLearner
from flextron_mcore.training.router import RouterTraining
from flextron_mcore.training.sampler import draw
from flextron_mcore.training.static import SurrogateLearner
from tests import toy, toy_axis
from tests.toy_axis import AXIS

NAME, ARCH = AXIS.name, toy.config()
SIZES = {"heads": [0.5, 1.0], "ffn_hidden_size": [0.5, 1.0], NAME: [0.25, 1.0]}


@pytest.fixture(autouse=True)
def axis(monkeypatch):
    monkeypatch.setitem(AXES, NAME, AXIS)


@pytest.fixture
def space(axis) -> ElasticSpace:
    return ElasticSpace.build(ARCH, **SIZES, hidden_size=[16, 32], depth=[1, 2])


def logits(model: torch.nn.Module, net) -> torch.Tensor:
    with torch.no_grad(), use_subnetwork(model, net):
        return model(*toy.inputs(), None)


def widths(net: SubNetwork) -> list[int]:
    return [layer.adapter_rank for layer in net.layers]


def test_axis_has_candidates_and_is_sampled(space, tmp_path):
    assert space.adapter_rank == (2, 8) and ElasticSpace.from_dict(ARCH, space.to_dict()) == space
    with pytest.raises(FlextronError, match="space.adapter_rank: 9 is not within 1..8"):
        ElasticSpace.build(ARCH, adapter_rank=[9])
    nets = draw(ARCH, space, seed=0, step=0, count=50)
    assert {width for net in nets for width in widths(net)} == {0, 2, 8}  # 0 in skipped layers
    for net in nets:
        space.check(ARCH, net)
        assert SubNetwork.from_dict(json.loads(net.to_json())) == net
    (tmp_path / "net.json").write_text(nets[0].to_json())
    assert SubNetwork.from_file(tmp_path / "net.json") == nets[0]
    other = replace(nets[0], layers=(replace(SubNetwork.full(ARCH).layers[0], added=((NAME, 3),)),) * 2)
    with pytest.raises(FlextronError, match=r"layers\[0\].adapter_rank 3 is not a candidate \[2, 8\]"):
        space.check(ARCH, other)


def test_old_files_have_none():
    layer = SubNetwork.full(ARCH).layers[0].to_dict()
    assert layer.pop(NAME) == 8
    assert widths(SubNetwork.from_dict({"hidden_size": 32, "layers": [layer] * 2})) == [0, 0]


def test_the_draws_of_the_other_axes_stay_as_they_are(space, monkeypatch):
    with_it = draw(ARCH, space, seed=3, step=5, count=8)
    monkeypatch.delitem(AXES, NAME)
    sizes = {name: sizes for name, sizes in space.sizes.items() if name != NAME}
    without = draw(ARCH, replace(space, sizes=sizes), seed=3, step=5, count=8)
    assert [replace(net, layers=tuple(replace(layer, added=()) for layer in net.layers)) for net in with_it] == without


def test_axis_is_priced_in_parameters_and_memory(space):
    parameters, memory = parameter_cost(ARCH, space), memory_cost(ARCH, space, "bf16", 2, 24)
    assert parameters.candidates[NAME] == (2 * 2 * 32, 2 * 8 * 32)
    for net in draw(ARCH, space, seed=2, step=0, count=10):
        assert parameters.of(net) == count_parameters(ARCH, net)
        assert memory.candidates[NAME] == tuple(2 * value for value in parameters.candidates[NAME])


def test_axis_is_timed(space, tmp_path):
    model = toy.model(ARCH, space).eval()
    table = measure(model, ARCH, space, Setting("prefill", 1, 8), 1, 2, seed=0)
    assert all(timing.median > 0 for timings in table.timings.values() for timing in timings.candidates[NAME])
    file = tmp_path / "latency.json"
    file.write_text(json.dumps(table.to_dict()))
    assert [row[NAME] for row in json.loads(file.read_text())["adapter"]] == [2, 8]
    assert LatencyTable.from_file(file, ARCH, space) == table
    assert (
        table.cost().candidates[NAME] == tuple(t.median for t in table.timings[32].candidates[NAME])
        or table.statistic != "median"
    )


def test_axis_is_sorted(space, tmp_path):
    model = toy.model(ARCH, space)
    info = open_checkpoint(toy.write(model, CheckpointInfo(ARCH, space), tmp_path / "first"))
    tokens, positions = toy.inputs()
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(tokens.shape), "position_ids": positions}

    def scored(model: torch.nn.Module) -> dict[int, torch.Tensor]:
        found = importance(
            [model], lambda: iter([batch]), 1, toy.LENGTH, len(tokens), space, dict.fromkeys(space.sizes, "energy")
        )
        return found.layers

    scores = scored(model)
    folder = iteration_path(tmp_path / "second", 0)
    folder.mkdir(parents=True)
    orders = {i: order(ARCH, space, layer) for i, layer in scores.items()}
    write_streaming(folder, replace(info, sorted=True), sorted_tensors(info, orders))
    after = build_model(ARCH, space, initialize=False).eval()
    load_model(after, open_checkpoint(folder))
    torch.testing.assert_close(logits(after, None), logits(model, None), atol=1e-4, rtol=1e-4)
    for i, layer in scored(after).items():
        assert (layer.units[NAME].diff() <= 1e-3).all() and not torch.equal(layer.units[NAME], scores[i].units[NAME])


def test_axis_is_cut(space, tmp_path, monkeypatch):
    """A uniform network is cut to a dense model that has the chosen adapter width as its full one."""
    model = toy.model(ARCH, space)
    info = open_checkpoint(toy.write(model, CheckpointInfo(ARCH, space), tmp_path / "run"))
    net = space.uniform(ARCH, 2, 24, 16, adapter_rank=2)
    tensors = {name: lazy.load() for name, lazy in cut(info, net, TensorReader(info)).items()}
    assert sum(tensor.numel() for tensor in tensors.values()) == count_parameters(ARCH, net)
    assert tensors["decoder.layers.1.adapter.up"].shape == (16, 2)
    sliced = logits(model, net)
    monkeypatch.setattr(toy_axis, "RANK", 2)
    small = cut_config(ARCH, net)
    dense = toy.model(small, ElasticSpace.build(small, **{name: [1.0] for name in AXES}))
    assert toy.memory_names(dense).keys() == tensors.keys()
    with torch.no_grad():
        for name, tensor in toy.memory_names(dense).items():
            tensor.copy_(tensors[name])
    torch.testing.assert_close(logits(dense, None), sliced, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["hf", "trtllm", "gguf", "megatron"])
def test_a_format_that_has_no_name_for_it_refuses(name, space, tmp_path):
    info = open_checkpoint(toy.write(toy.model(ARCH, space), CheckpointInfo(ARCH, space), tmp_path / "run"))
    (tmp_path / "out").mkdir()
    with pytest.raises(FlextronError, match=f"format={name}: .* tensor .*adapter"):
        get_format(name).write(Job(info, SubNetwork.full(ARCH), tmp_path / "out"))
    assert not [file for file in (tmp_path / "out").iterdir() if file.stat().st_size]


def test_axis_is_routed_statically():
    """The first layer's adapter matters most to the loss: at every budget the routers keep it whole and reduce other blocks."""
    space = ElasticSpace.build(ARCH, **SIZES)
    choices, cost = Choices(ARCH, space), parameter_cost(ARCH, space)
    assert choices.blocks == [(layer, name) for layer in (0, 1) for name in ("heads", "ffn_hidden_size", NAME)]
    info = RouterInfo(("parameters",), ((cost.smallest / cost.full, 1.0),), 16, {})
    training = RouterTraining(choices, [cost], info, 8, 0, 60)
    learner = SurrogateLearner(training, RouterSettings(), SurrogateSettings())
    for step in range(60):
        missing = [(sum(2 - i for i in choices.indices(net)), net.layers[0].adapter_rank == 2) for net in learner.networks(step)]
        learner.learn(step, [0.0, *(0.1 * others + adapter for others, adapter in missing)])
    for share in (0.65, 0.75, 0.85):
        net = learner.choose(share)
        assert net.layers[0].adapter_rank == 8 and (share - 0.05) * cost.full <= cost.of(net) <= share * cost.full


@pytest.mark.parametrize("uniform", [False, True])
def test_axis_is_routed_with_all_axes(space, uniform):
    choices, cost = Choices(ARCH, space, all_axes=True, uniform=uniform), parameter_cost(ARCH, space)
    for seed in range(10):
        net = choices.network([int(np.random.default_rng([seed, i]).integers(len(s))) for i, s in enumerate(choices.sizes)])
        assert choices.network(choices.indices(net)) == net
    info = RouterInfo(("parameters",), ((cost.smallest / cost.full, 1.0),), 16, {}, "gumbel", uniform=uniform)
    learner, model = GumbelLearner(RouterTraining(choices, [cost], info, 3, 0, 10), GumbelSettings()), toy.model(ARCH, space)
    tokens, positions = toy.inputs()
    weighted, *drawn = learner.networks(0)
    net = WeightedNetwork.of(weighted, torch.device("cpu"))
    with use_subnetwork(model, net):
        model(tokens, positions, None).square().mean().backward()
    gradients = net.gradients(1.0, False)
    assert len(gradients) == 5 and gradients[-1].abs().max() > 0  # hidden size, depth, heads, neurons, adapter ranks
    before = learner.routers.out_NKU.detach().clone()
    learner.learn(0, [1.0] * (len(drawn) + 2), [gradients])
    rows = [row for row, axis in enumerate(choices.axes) if axis.name == NAME]
    assert (learner.routers.out_NKU[rows] != before[rows]).any(-1).any(-1).all()
    assert learner.choose(0.8).layers[0].adapter_rank in (0, 2, 8)


def test_axis_is_selected():
    space = ElasticSpace.build(ARCH, **SIZES)
    choices, cost = Choices(ARCH, space), parameter_cost(ARCH, space)
    degradation_NK = np.array([[0.0 if axis.name == "ffn_hidden_size" else 1.0, 0.0] for axis in choices.axes])
    net = Sensitivity(choices, degradation_NK).select([Budget(cost, 0.8 * cost.full)])
    assert widths(net) == [8, 8] and {layer.ffn_hidden_size for layer in net.layers} == {24}
    assert {widths(net)[0] for net in Uniform(choices).networks()} == {2, 8}
    assert "uniform 50% heads 50% ffn 25% adapter" in uniform_family(ARCH, space)


def test_axis_is_shown(space):
    net = space.uniform(ARCH, adapter_rank=2)
    assert describe(net, ARCH) == "100% heads, 100% FFN, 25% Adapter"
    assert [name for name, _ in layer_columns([net], ARCH)] == ["Heads of 4", "FFN of 48", "Adapter of 8"]
