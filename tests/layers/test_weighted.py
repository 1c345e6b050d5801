"""Weighted candidates: one-hot weights equal the sub-network; gradients equal finite differences of the loss."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.choosing import set_subnetwork, use_subnetwork
from flextron_mcore.config import ModelConfig
from flextron_mcore.layers.weighted import WeightedNetwork, mask
from flextron_mcore.model import build_model
from flextron_mcore.pipeline.networks import run_networks
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.space import ElasticSpace, SubNetwork, parameter_share
from tests import toy
from tests.pipeline.test_networks import batches

CASES = {
    "llama": (toy.LLAMA, "kv_group"),
    "gpt2": (toy.GPT2, "kv_group"),
    "layernorm1p": (dict(toy.GPT2, normalization="layernorm1p"), "kv_group"),
    "query_head": (toy.LLAMA, "query_head"),
}


def case(name: str) -> tuple[ModelConfig, ElasticSpace]:
    kind, unit = CASES[name]
    arch = toy.config(**kind, num_layers=3, num_query_groups=2, share_embeddings_and_output_weights=name == "llama")
    axes = dict(heads=[0.5, 1.0], ffn_hidden_size=[0.25, 0.5, 1.0], hidden_size=[0.25, 0.5, 1.0], depth=[1, 2, 3])
    return arch, ElasticSpace.build(arch, attention_unit=unit, **axes, layer_ranking=[1, 2, 0], modulation=name != "query_head")


def one_hot(space: ElasticSpace, net: SubNetwork, heads_of_skipped: int = 0) -> list:
    """One-hot weights that select `net`; a skipped layer gets some widths, which do not matter."""
    heads = [layer.num_attention_heads if layer.executed else space.heads[heads_of_skipped] for layer in net.layers]
    neurons = [layer.ffn_hidden_size if layer.executed else space.ffn_hidden_size[0] for layer in net.layers]
    pick = lambda size, axis: [float(size == candidate) for candidate in axis]  # noqa: E731
    return [
        pick(net.hidden_size, space.hidden_size),
        [float(layer.executed) for layer in net.layers],
        [pick(size, space.heads) for size in heads],
        [pick(size, space.ffn_hidden_size) for size in neurons],
    ]


def soft(space: ElasticSpace, layers: int, seed: int = 0) -> list:
    """Random weights between 0 and 1; those of one choice sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [
        random(len(space.hidden_size)).softmax(-1).tolist(),
        random(layers).sigmoid().tolist(),
        random(layers, len(space.heads)).softmax(-1).tolist(),
        random(layers, len(space.ffn_hidden_size)).softmax(-1).tolist(),
    ]


def weighted(weights: list) -> WeightedNetwork:
    return WeightedNetwork.of(weights, torch.device("cpu"))


@pytest.mark.parametrize("name", CASES)
def test_one_hot_weights_are_the_sliced_network(name):
    """Logits and gradients of parameters are equal."""
    arch, space = case(name)
    model = toy.model(arch, space)
    tokens, positions = toy.inputs()
    seen = set()
    for seed in range(4):
        net = toy.random_network(arch, space, seed)
        seen.add((net.hidden_size, sum(layer.executed for layer in net.layers)))
        found = []
        for chosen in (net, weighted([*one_hot(space, net), parameter_share(arch, net)])):
            model.zero_grad(set_to_none=True)
            with use_subnetwork(model, chosen):
                logits = model(tokens, positions, None)
                logits.square().mean().backward()
            grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
            found.append((logits.detach(), grads))
        torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
        for parameter, grad in found[0][1].items():
            torch.testing.assert_close(found[1][1][parameter], grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=parameter: f"{n}: {m}")
    assert len(seen) > 2


def mean_loss(model: torch.nn.Module, weights: WeightedNetwork) -> float:
    total = run_networks([model], lambda: iter(batches()), 2, [weights], toy.LENGTH, 2, forward_only=True)
    return (total[0, 0] / total[0, 1]).item()


@pytest.mark.parametrize("name, frozen", [("llama", False), ("layernorm1p", False), ("query_head", True)])
def test_gradients_are_differences_of_the_loss(name, frozen):
    arch, space = case(name)
    model = toy.model(arch, space).requires_grad_(not frozen)
    for weights in (soft(space, 3), one_hot(space, space.uniform(arch, 2, 24, 16, 2))):
        net = weighted([*weights, 0.4])
        total = run_networks([model], lambda: iter(batches()), 2, [net], toy.LENGTH, 2)
        gradients = net.gradients(total[0, 1].item(), sequence_parallel=False)
        assert len(gradients) == 4
        for number, (leaf, gradient) in enumerate(zip(net.leaves, gradients, strict=True)):
            assert gradient.shape == leaf.shape and gradient.dtype == torch.float64
            for index in range(leaf.numel()):
                ends = []
                for step in (0.003, -0.003):
                    with torch.no_grad():
                        leaf.view(-1)[index] += step
                    ends.append(mean_loss(model, net))
                    with torch.no_grad():
                        leaf.view(-1)[index] -= step
                difference = (ends[0] - ends[1]) / 0.006
                assert gradient.view(-1)[index].item() == pytest.approx(difference, rel=0.02, abs=1e-3), number
        assert gradients[0].abs().min() > 0  # all candidates have a gradient, not only the chosen one


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_sees_the_weights(recompute):
    """Two networks in flight, as in a pipeline, each with a channel mask that its layers share."""
    arch, space = case("llama")
    options = {"recompute_granularity": recompute}
    options |= {"recompute_method": "uniform", "recompute_num_layers": 1} if recompute == "full" else {}
    found = []
    for choices in ({}, options):
        torch.manual_seed(0)
        model = build_model(arch, space, LayoutSettings(**choices)).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += 0.5 * name.endswith("modulation")
        networks, losses = [weighted([*soft(space, 3, seed), 0.3 + 0.4 * seed]) for seed in range(2)], []
        for seed, net in enumerate(networks):
            tokens, positions = toy.inputs(seed=seed)
            with use_subnetwork(model, net):
                losses.append(model(tokens, positions, None, labels=tokens).sum())
        for loss in losses:
            loss.backward()
        found.append([gradient for net in networks for gradient in net.gradients(1.0, False)])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


def test_masks_of_weights_and_the_full_model_afterwards():
    weights = torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(mask(weights, [1, 2, 4]), torch.tensor([1.0, 0.8, 0.5, 0.5]))
    arch, space = case("llama")
    model = toy.model(arch, space)
    tokens, positions = toy.inputs()
    before = model(tokens, positions, None)
    set_subnetwork(model, weighted(soft(space, 3)))
    assert not torch.allclose(model(tokens, positions, None), before, atol=1e-2)
    set_subnetwork(model, None)
    torch.testing.assert_close(model(tokens, positions, None), before, rtol=0, atol=0)
