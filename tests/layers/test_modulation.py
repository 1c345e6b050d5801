"""Modulation (a learned gain on each block's output): equals a dense model with scaled weights; the full model has none."""

from __future__ import annotations

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel

from flextron_mcore.choosing import set_subnetwork, use_subnetwork
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.layers.block import gain
from flextron_mcore.layers.tokens.layer import FixedLevels
from flextron_mcore.layers.weighted import WeightedNetwork
from flextron_mcore.model import transformer_config
from flextron_mcore.pipeline.networks import run_networks
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters
from flextron_mcore.specs import elastic_gpt_layer_spec
from tests import toy
from tests.layers.test_equality import KINDS, dense, mask_like, stock_logits
from tests.layers.test_weighted import one_hot
from tests.pipeline.test_networks import batches

AXES = dict(heads=[0.5, 1.0], hidden_size=[0.25, 0.5, 1.0], depth=[1, 2, 3], layer_ranking=[1, 2, 0])


def case(kind: str = "gpt2") -> tuple[ModelConfig, ElasticSpace, torch.nn.Module, torch.nn.Module]:
    """Architecture, space with modulation, a model of it, and a model with the same weights but no modulation."""
    arch = toy.config(**KINDS[kind], num_layers=3, num_query_groups=2, share_embeddings_and_output_weights=kind == "gpt2")
    plain, space = ElasticSpace.build(arch, **AXES), ElasticSpace.build(arch, **AXES, modulation=True)
    model, without = toy.model(arch, space), toy.model(arch, plain)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("modulation")}
    assert len(model.state_dict()) == len(state) + 2 * arch.num_layers
    without.load_state_dict(state)
    return arch, space, model, without


def modulations(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("modulation")}


@torch.no_grad()
def logits(model: torch.nn.Module, net) -> torch.Tensor:
    tokens, positions = toy.inputs()
    with use_subnetwork(model, net):
        return model(tokens, positions, None)


def test_the_gain():
    modulation = torch.tensor([0.5, -2.0])
    assert gain(modulation, 0.25).item() == pytest.approx(1 + 0.75 * (0.5 - 2.0 * 0.25))
    assert gain(torch.tensor([1e20, -3e20]), 1.0).item() == 1
    assert gain(torch.zeros(2), 0.3).item() == 1
    assert gain(modulation.bfloat16(), 0.3).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_masked_is_sliced_is_dense_with_the_gains_in_the_weights(kind):
    arch, space, model, without = case(kind)
    for hidden, depth, heads, width in [(8, 3, 4, 48), (16, 2, 2, 24), (32, 1, 2, 12), (32, 3, 4, 24)]:
        net = space.uniform(arch, heads, width, hidden, depth)
        share = count_parameters(arch, net) / count_parameters(arch)
        state = {name: value for name, value in model.state_dict().items() if value is not None}
        for name, (first, second) in modulations(model).items():
            for end in ("linear_proj.weight", "linear_proj.bias", "linear_fc2.weight", "linear_fc2.bias"):
                key = name.replace("modulation", end)
                if key in state:
                    state[key] = state[key] * (1 + (1 - share) * (first + second * share))
        folded = toy.model(arch, ElasticSpace.build(arch, **AXES))
        folded.load_state_dict({name: value for name, value in state.items() if not name.endswith("modulation")}, strict=False)
        small = stock_logits(dense(arch, folded, net), *toy.inputs()).detach()
        sliced = logits(model, net)
        weights = WeightedNetwork.of([*one_hot(space, net), share], torch.device("cpu"))
        torch.testing.assert_close(sliced, small, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits(model, weights), sliced, atol=1e-5, rtol=1e-5)
        mask_like(folded, net)
        torch.testing.assert_close(logits(folded, None), sliced, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logits(without, net), sliced, atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_full_model_is_untouched_and_so_is_every_network_before_training(kind):
    arch, space, model, without = case(kind)
    for net in (None, SubNetwork.full(arch)):
        assert torch.equal(logits(model, net), logits(without, net))
    with torch.no_grad():
        for parameter in modulations(model).values():
            parameter.zero_()
    for seed in range(4):
        net = toy.random_network(arch, space, seed)
        assert torch.equal(logits(model, net), logits(without, net))


def test_gradients_are_differences_of_the_loss():
    arch, space, model, _ = case()
    tokens, positions = toy.inputs()

    def loss_of(net) -> torch.Tensor:
        with use_subnetwork(model, net):
            return model(tokens, positions, None, labels=tokens.roll(-1, 1)).mean()

    net = space.uniform(arch, 2, 24, 16, 2)
    executed = [layer.executed for layer in net.layers]
    assert sum(executed) == 2
    loss_of(net).backward()
    for name, parameter in modulations(model).items():
        if not executed[int(name.split(".")[2])]:
            assert parameter.grad is None
            continue
        for i in range(2):
            ends = []
            for step in (0.01, -0.01):
                with torch.no_grad():
                    parameter[i] += step
                    ends.append(loss_of(net).item())
                    parameter[i] -= step
            assert parameter.grad[i].item() == pytest.approx((ends[0] - ends[1]) / 0.02, rel=0.03, abs=3e-4), name
    model.zero_grad(set_to_none=True)
    loss_of(None).backward()
    assert all(parameter.grad is None for parameter in modulations(model).values())


def test_overlapping_reduction_does_not_wait_for_what_a_network_leaves_out():
    """Overlapping reduction expects gradients of the same parameters in every step, but a network may leave some of them out."""
    arch, space, gpt, _ = case("llama")
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
    model = DistributedDataParallel(gpt.config, options, gpt)
    gpt.config.finalize_model_grads_func, gpt.config.no_sync_func = finalize_model_grads, model.no_sync
    shallow = space.uniform(arch, 2, 24, 16, 1)
    for nets, executed in (([None, shallow], 1), ([None], None), ([None, shallow], 1)):
        model.zero_grad_buffer()
        run_networks([model], lambda: iter(batches()), 2, nets, toy.LENGTH, 2)
        found = {name: bool(parameter.main_grad.any()) for name, parameter in modulations(gpt).items()}
        assert found == {name: f".{executed}." in name for name in found}


def test_the_gain_depends_on_the_parameter_share_of_the_network():
    arch, space, model, _ = case()
    blocks = [block for layer in model.decoder.layers for block in (layer.self_attention, layer.mlp)]
    small, smaller = space.uniform(arch, 2, 24), space.uniform(arch, 2, 12, 16, 2)
    shares = [count_parameters(arch, net) / count_parameters(arch) for net in (small, smaller)]
    with use_subnetwork(model, small):
        with use_subnetwork(model, smaller):
            assert {block.state.share for block in blocks} == {shares[1]}
        assert {block.state.share for block in blocks} == {shares[0]}
    assert {block.state.share for block in blocks} == {None}


def test_token_routing_and_foreign_models_with_modulation_are_refused():
    arch, space, model, _ = case()
    with pytest.raises(FlextronError, match="token routing does not support modulation"):
        set_subnetwork(model, FixedLevels(torch.zeros(2 * arch.num_layers, toy.LENGTH, 2, dtype=torch.long)))
    foreign = GPTModel(transformer_config(arch), elastic_gpt_layer_spec(space), arch.vocab_size, arch.max_position_embeddings)
    with pytest.raises(FlextronError, match="space.modulation needs a model that was built with flextron_mcore.build_model"):
        set_subnetwork(foreign, space.uniform(arch, 2, 24))
    set_subnetwork(foreign, None)
