"""A block that an axis adds to every layer (tests/toy_axis.py) follows the layer's state like the built-in blocks."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.axes import AXES
from flextron_mcore.choosing import set_subnetwork, use_subnetwork
from flextron_mcore.layers.block import new_gates
from flextron_mcore.layers.weighted import WeightedNetwork
from flextron_mcore.model import build_model
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.space import ElasticSpace, SubNetwork, parameter_share
from tests import toy
from tests.toy_axis import AXIS


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(AXES, AXIS.name, AXIS)


def networks(space: ElasticSpace, arch) -> list[SubNetwork]:
    """Two networks of different adapter ranks in every layer. The second has half the channels and skips a layer."""
    ranks = space.sizes[AXIS.name]
    layers = [space.layer_choice(arch, space.heads[i], space.ffn_hidden_size[-1 - i], ranks[i]) for i in range(3)]
    return [space.network(arch, layers), space.network(arch, layers[::-1], 16, 2)]


def test_sliced_is_masked_is_weighted(added):
    arch = toy.config(num_layers=3)
    space = ElasticSpace.build(arch, hidden_size=[0.5, 1.0], depth=[2, 3], modulation=True)
    model, (tokens, positions) = toy.model(arch, space), toy.inputs()
    with torch.no_grad():
        full = model(tokens, positions, None)
    for net in networks(space, arch):
        assert len({layer.adapter_rank for layer in net.layers}) == 3
        weights = [[float(size == net.hidden_size) for size in space.hidden_size], [float(row.executed) for row in net.layers]]
        for axis in space.layer_axes:
            chosen = [axis.size(row) or space.sizes[axis.name][0] for row in net.layers]
            weights.append([[float(size == own) for size in space.sizes[axis.name]] for own in chosen])
        weighted = WeightedNetwork.of([*weights, parameter_share(arch, net)], torch.device("cpu"))
        with torch.no_grad(), use_subnetwork(model, net):
            sliced = model(tokens, positions, None)
            found = [layer.adapter.state.widths.adapter_rank for layer in model.decoder.layers]
            assert found == [row.adapter_rank for row in net.layers]
        with use_subnetwork(model, weighted):
            logits = model(tokens, positions, None)
        torch.testing.assert_close(logits, sliced, atol=1e-5, rtol=1e-5)
        logits.square().mean().backward()
        assert weighted.widths_LK[AXIS.name].grad.abs().sum() > 0
        assert not torch.allclose(sliced, full, atol=1e-2)


@pytest.mark.parametrize("recompute", [False, True])
def test_gates_and_slices_have_their_gradients(added, recompute):
    """Rows that the network leaves out have no gradient, also when activations are recomputed while another choice is set."""
    arch = toy.config(num_layers=3)
    recomputed = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    options = LayoutSettings(**recomputed) if recompute else None
    space = ElasticSpace.build(arch)
    torch.manual_seed(0)
    model, (tokens, positions) = build_model(arch, space, options).train(), toy.inputs()
    net, _ = networks(space, arch)
    (gates,) = new_gates(1, 9, torch.device("cpu"))
    set_subnetwork(model, net, gates)
    loss = model(tokens, positions, None, labels=tokens).sum()
    set_subnetwork(model, None)
    loss.backward()
    for layer, row in zip(model.decoder.layers, net.layers, strict=True):
        used = layer.adapter.down.grad.abs().sum(1) > 0
        assert used.tolist() == [i < row.adapter_rank for i in range(8)]
    assert all(gate.grad.abs() > 0 for gate in gates)
