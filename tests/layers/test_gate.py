"""Gates (a factor 1 on each block's output) change no value; a gate's gradient is the derivative of the loss by its factor."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.choosing import set_subnetwork
from flextron_mcore.layers.block import new_gates
from flextron_mcore.model import build_model
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.space import ElasticSpace
from tests import toy

CASES = {"llama": toy.LLAMA, "gpt2": toy.GPT2}


def loss_of(model, net, gates) -> torch.Tensor:
    tokens, positions = toy.inputs()
    set_subnetwork(model, net, gates)
    loss = model(tokens, positions, None, labels=tokens.roll(-1, 1)).mean()
    set_subnetwork(model, None)
    return loss


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_differences(family, frozen):
    arch = toy.config(**CASES[family])
    space = ElasticSpace.build(arch, modulation=True)
    model = toy.model(arch, space).requires_grad_(not frozen).double()
    net = toy.random_network(arch, space, 3)
    (gates,) = new_gates(1, 4, torch.device("cpu"))
    gates = [gate.detach().double().requires_grad_() for gate in gates]
    loss = loss_of(model, net, gates)
    assert loss.item() == loss_of(model, net, None).item()
    loss.backward()
    for block in range(4):
        ends = [[gate.detach() + (h if i == block else 0) for i, gate in enumerate(gates)] for h in (0.01, -0.01)]
        above, below = (loss_of(model, net, moved).item() for moved in ends)
        assert gates[block].grad.item() == pytest.approx((above - below) / 0.02, rel=0.02, abs=2e-5)
    assert len({round(gate.grad.item(), 9) for gate in gates}) == 4


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_sees_the_gates_and_gains(recompute):
    """Two networks in flight, as in a pipeline: the first's backward pass comes after the second's forward pass."""
    arch = toy.config()
    space = ElasticSpace.build(arch, modulation=True)
    options = {"recompute_granularity": recompute}
    options |= {"recompute_method": "uniform", "recompute_num_layers": 1} if recompute == "full" else {}
    found = []
    for choices in ({}, options):
        torch.manual_seed(0)
        model = build_model(arch, space, LayoutSettings(**choices)).train()
        gains = [parameter for name, parameter in model.named_parameters() if name.endswith("modulation")]
        with torch.no_grad():
            for parameter in gains:
                parameter += 0.5
        gates = new_gates(2, 4, torch.device("cpu"))
        losses = [loss_of(model, toy.random_network(arch, space, seed), row) for seed, row in enumerate(gates)]
        for loss in losses:
            loss.backward()
        found.append([[gate.grad.item() for gate in row] for row in gates] + [parameter.grad.tolist() for parameter in gains])
    for plain, recomputed in zip(*found, strict=True):
        assert recomputed == pytest.approx(plain, rel=1e-4)
