"""Masked = sliced = dense, for every kind of MLP and attention; the full network equals the stock GPTModel."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from flextron_mcore.choosing import set_subnetwork, use_subnetwork
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.layers.ends import ElasticEmbedding, ElasticPositions
from flextron_mcore.layers.state import FULL
from flextron_mcore.model import gpt_model, transformer_config
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters
from flextron_mcore.specs import elastic_gpt_layer_spec
from tests import toy

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.2], "long_factor": [1.5, 3.0], "original_max_position_embeddings": 4}
KINDS = {
    "llama": toy.LLAMA,
    "gpt2": toy.GPT2,
    "squared-relu without biases": dict(toy.LLAMA, activation="squared-relu"),
    "geglu with biases": dict(toy.LLAMA, activation="geglu", bias=True),
    "layernorm1p": dict(toy.GPT2, normalization="layernorm1p", activation="gelu"),
    "qwen2": dict(toy.LLAMA, add_qkv_bias=True),
    "qwen3 with yarn": dict(toy.LLAMA, qk_layernorm=True, rope_scaling=YARN),
    "mistral with a window": dict(toy.LLAMA, sliding_window=7),
    "nemotron with longrope": dict(
        toy.LLAMA, normalization="layernorm1p", activation="squared-relu", rotary_percent=0.5, rope_scaling=LONGROPE
    ),
}
ATTENTION = {
    "mha": (4, "kv_group"),
    "gqa groups": (2, "kv_group"),
    "gqa heads": (2, "query_head"),
    "mqa heads, compensated": (1, "query_head"),
}


def case(kind: str, attention: str) -> tuple[ModelConfig, ElasticSpace]:
    groups, unit = ATTENTION[attention]
    arch = toy.config(**KINDS[kind], num_query_groups=groups)
    fractions = [0.5, 1.0] if groups == 2 else [0.25, 0.5, 0.75, 1.0]
    return arch, ElasticSpace.build(arch, attention_unit=unit, heads=fractions, compensation="compensated" in attention)


def stock(arch: ModelConfig, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Stock GPTModel with these weights. Its local norms have no zero-centred scale, so 1 is added to the weights."""
    zero_centered = arch.normalization == "layernorm1p"
    arch = ModelConfig(**{**arch.to_dict(), "normalization": "layernorm" if zero_centered else arch.normalization})
    config = transformer_config(arch)
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    model = gpt_model(arch, config, spec).eval()
    norms = ("layernorm.weight",) if zero_centered else ()
    model.load_state_dict({k: v + 1 if k.endswith(norms) and norms else v for k, v in state.items()})
    return model


def stock_logits(model: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    length = tokens.shape[1]
    return model(tokens, positions, torch.ones(length, length, dtype=torch.bool).triu(1)[None, None])


def mask_like(model: torch.nn.Module, net: SubNetwork) -> None:
    """Reference for a sub-network: make the full model multiply unused neurons, heads and channels by zero."""
    norms = [model.decoder.final_layernorm]
    for layer, choice in zip(model.decoder.layers, net.layers, strict=True):
        norms += [layer.input_layernorm, layer.pre_mlp_layernorm]
        if not choice.executed:
            layer.forward = lambda hidden_states, **_: (hidden_states, None)
        neurons = (torch.arange(layer.mlp.config.ffn_hidden_size) < choice.ffn_hidden_size).float()
        attention = layer.self_attention
        groups, queries = attention.layout.used(None)
        heads = torch.zeros(groups, queries, attention.hidden_size_per_attention_head)
        heads[: choice.kv_groups, : choice.query_heads_per_group] = 1
        layer.mlp.observe = lambda hidden, mask=neurons: hidden * mask
        channels = heads.flatten()
        attention.linear_proj.observe = lambda hidden, mask=channels: hidden * mask
    for norm in norms:  # the norms, which read the residual stream
        norm.forward = lambda x, norm=norm: normed(norm, x, net.hidden_size)


def normed(norm: torch.nn.Module, x: torch.Tensor, channels: int) -> torch.Tensor:
    """The norm by its definition over the first `channels` channels of x; zero in the others."""
    mask = (torch.arange(x.shape[-1]) < channels).float()
    rms = isinstance(norm, torch.nn.RMSNorm)
    x = (x if rms else x - (x * mask).sum(-1, keepdim=True) / channels) * mask
    x = x / ((x**2).sum(-1, keepdim=True) / channels + norm.eps).sqrt()
    weight = norm.weight + (not rms and norm.zero_centered)
    return (x * weight if rms else x * weight + norm.bias) * mask


def dense(arch: ModelConfig, model: torch.nn.Module, net: SubNetwork) -> torch.nn.Module:
    """Stock model of the sub-network's size, with weights cut here, without the package's code."""
    kept = [i for i, layer in enumerate(net.layers) if layer.executed]
    choice, c = net.layers[kept[0]], net.hidden_size
    small = ModelConfig(
        **{**arch.to_dict(), "num_attention_heads": choice.num_attention_heads, "num_query_groups": choice.kv_groups,
           "ffn_hidden_size": choice.ffn_hidden_size, "hidden_size": c, "num_layers": len(kept)}
    )  # fmt: skip
    g, q, f, h = choice.kv_groups, choice.query_heads_per_group, choice.ffn_hidden_size, arch.kv_channels
    state = {}
    for name, value in model.state_dict().items():
        if value is None or name.endswith("compensation"):
            continue
        heads_norm = "q_layernorm" in name or "k_layernorm" in name  # one scale for all heads
        if "linear_fc1" in name:
            value = torch.cat([part[:f] for part in value.chunk(2 if arch.gated else 1)])
        elif name.endswith("linear_fc2.weight"):
            value = value[:, :f]
        elif "linear_qkv" in name:
            groups = value.view(arch.num_query_groups, arch.query_heads_per_group + 2, h, -1)[:g]
            value = torch.cat([groups[:, :q], groups[:, -2:]], 1).reshape(g * (q + 2) * h, *value.shape[1:])
        elif name.endswith("linear_proj.weight"):
            value = value.view(-1, arch.num_query_groups, arch.query_heads_per_group, h)[:, :g, :q]
            if (matrix := model.state_dict().get(name.replace("weight", "compensation"))) is not None:
                # column of head j: the sum over heads k of matrix[k, j] times column k
                columns = [
                    [sum(matrix[i, k, j] * value[:, i, k] for k in range(q)) for j in range(q)] for i in range(g)
                ]  # fmt: skip
                value = torch.stack([torch.stack(group, 1) for group in columns], 1)
            value = value.reshape(len(value), -1)
        if name.endswith(("linear_fc1.weight", "linear_qkv.weight", "embeddings.weight", "output_layer.weight")):
            value = value[:, :c]
        elif "linear_fc1" not in name and "linear_qkv" not in name and not heads_norm:  # linear_proj, fc2, their biases, norms
            value = value[:c]
        if layer := re.match(r"decoder\.layers\.(\d+)\.", name):
            if int(layer[1]) not in kept:
                continue
            name = f"decoder.layers.{kept.index(int(layer[1]))}.{name[layer.end() :]}"
        state[name] = value
    return stock(small, state)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", KINDS)
def test_full_network_is_the_stock_model(kind, attention):
    arch, space = case(kind, attention)
    model = toy.model(arch, space)
    reference = dense(arch, model, SubNetwork.full(arch)) if space.compensation else stock(arch, model.state_dict())
    tokens, positions = toy.inputs()
    with torch.no_grad():
        expected = stock_logits(reference, tokens, positions)
        for net in (None, SubNetwork.full(arch)):
            with use_subnetwork(model, net):
                torch.testing.assert_close(model(tokens, positions, None), expected, atol=1e-5, rtol=0)
    assert count_parameters(arch) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_is_sliced_is_dense(kind, attention):
    arch, space = case(kind, attention)
    tokens, positions = toy.inputs()
    for heads in space.heads:
        for width in space.ffn_hidden_size:
            net = space.uniform(arch, heads, width)
            model = toy.model(arch, space)
            with torch.no_grad():
                small = dense(arch, model, net)
                with use_subnetwork(model, net):
                    sliced = model(tokens, positions, None)
                mask_like(model, net)
                masked = model(tokens, positions, None)
                torch.testing.assert_close(sliced, masked, atol=1e-5, rtol=0)
                torch.testing.assert_close(sliced, stock_logits(small, tokens, positions), atol=1e-5, rtol=0)
                assert count_parameters(arch, net) == sum(p.numel() for p in small.parameters())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    groups=st.integers(1, 4), queries=st.integers(1, 3), size=st.sampled_from([4, 6, 8]), ffn=st.integers(1, 40),
    hidden=st.integers(8, 40), narrow=st.integers(4, 8), depth=st.integers(1, 3), kind=st.sampled_from(sorted(KINDS)),
    unit=st.sampled_from(["kv_group", "query_head"]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_random_spaces_and_networks_with_gradients(groups, queries, size, ffn, hidden, narrow, depth, kind, unit, seed):
    """Logits and gradients of networks whose layers differ, in odd shapes, equal those of the masked oracle.

    Not below 4 channels: a LayerNorm of 2 divides by their difference, which can magnify rounding tenfold.
    """
    size = 8 if "longrope" in kind else size  # longrope's factors are for four channels, which must be half of a head
    arch = toy.config(
        **KINDS[kind], hidden_size=hidden, num_attention_heads=groups * queries, num_query_groups=groups, kv_channels=size,
        ffn_hidden_size=ffn, num_layers=3, share_embeddings_and_output_weights=bool(seed % 2),
    )  # fmt: skip
    step = queries if unit == "kv_group" else groups
    heads = [step * (i + 1) for i in range(groups * queries // step)]
    space = ElasticSpace.build(
        arch, granularity=1, attention_unit=unit, heads=heads, ffn_hidden_size=sorted({1, (ffn + 1) // 2, ffn}),
        hidden_size=[narrow, hidden], depth=[depth, 3], layer_ranking=[(seed + i) % 3 for i in range(3)],
        compensation=unit == "query_head" and seed % 3 > 0,
    )  # fmt: skip
    net = toy.random_network(arch, space, seed)
    space.check(arch, net)
    tokens, positions = toy.inputs(seed=seed)
    model = toy.model(arch, space, seed)
    results = []
    for masked in (False, True):
        model.zero_grad(set_to_none=True)
        if masked:
            mask_like(model, net)
        with use_subnetwork(model, None if masked else net):
            logits = model(tokens, positions, None)
            logits.square().mean().backward()
        results.append((logits, {n: grad_of(p) for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def grad_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Gradient of a parameter; zeros where a skipped layer has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def test_choice_is_restored_and_nested():
    arch, space = case("llama", "mha")
    model = toy.model(arch, space)
    small, smaller = space.uniform(arch, 2, 24), space.uniform(arch, 1, 12)
    with use_subnetwork(model, small):
        with use_subnetwork(model, smaller):
            assert model.decoder.layers[0].mlp.state.widths == smaller.layers[0]
        assert model.decoder.layers[1].self_attention.state.widths == small.layers[1]
    assert model.decoder.layers[0].mlp.state is FULL
    with pytest.raises(RuntimeError), use_subnetwork(model, small):
        raise RuntimeError
    assert model.decoder.layers[0].mlp.state is FULL


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_size_and_depth_are_those_of_a_dense_model(kind, tied):
    """Networks over all axes equal dense models. Skipped layers do not run, and unused channels are not read."""
    arch = toy.config(**KINDS[kind], num_layers=4, num_query_groups=2, share_embeddings_and_output_weights=tied)
    space = ElasticSpace.build(
        arch, heads=[0.5, 1.0], hidden_size=[0.25, 0.5, 1.0], depth=[1, 3, 4], layer_ranking=[2, 0, 3, 1]
    )  # fmt: skip
    tokens, positions = toy.inputs()
    for hidden, depth, heads, width in [(8, 4, 4, 48), (16, 3, 2, 24), (32, 1, 2, 12), (8, 1, 4, 24)]:
        net = space.uniform(arch, heads, width, hidden, depth)
        space.check(arch, net)
        assert [i for i, layer in enumerate(net.layers) if layer.executed] == sorted([2, 0, 3, 1][:depth])
        model = toy.model(arch, space)
        run = []
        for layer in model.decoder.layers:
            layer.self_attention.register_forward_hook(lambda module, *_, run=run: run.append(module.layer_number - 1))
        looked_up = []
        for embedding in model.embedding.children():
            if isinstance(embedding, (ElasticEmbedding, ElasticPositions)):
                embedding.register_forward_hook(lambda *args, found=looked_up: found.append(args[-1].shape[-1]))
        with torch.no_grad():
            small = dense(arch, model, net)
            with use_subnetwork(model, net):
                sliced = model(tokens, positions, None)
            assert run == sorted([2, 0, 3, 1][:depth])
            assert looked_up == [hidden] * (2 if arch.position_embedding_type == "learned_absolute" else 1)
            mask_like(model, net)
            masked = model(tokens, positions, None)
        torch.testing.assert_close(sliced, masked, atol=1e-5, rtol=0)
        torch.testing.assert_close(sliced, stock_logits(small, tokens, positions), atol=1e-5, rtol=0)
        assert count_parameters(arch, net) == sum(p.numel() for p in small.parameters())


def test_a_network_of_another_model_is_refused():
    arch, space = case("llama", "mha")
    model = toy.model(arch, space)
    full = SubNetwork.full(arch)
    with pytest.raises(FlextronError, match="has 1 layers, the model has 2"):
        set_subnetwork(model, replace(full, layers=full.layers[:1]))
    with pytest.raises(FlextronError, match="has hidden_size 64, the model has 32"):
        set_subnetwork(model, replace(full, hidden_size=64))
    config = transformer_config(arch)
    stock_ends = GPTModel(config, elastic_gpt_layer_spec(space), arch.vocab_size, arch.max_position_embeddings)
    with pytest.raises(FlextronError, match="build the model with flextron_mcore.build_model"):
        set_subnetwork(stock_ends, replace(full, hidden_size=16))


@pytest.mark.parametrize("token", [-1, toy.VOCAB, 5 * toy.VOCAB])
def test_a_token_without_a_row_is_an_error(token: int):
    """Elastic embeddings refuse ids without a row, as stock ones do, and do not take another token's row."""
    arch, space = case("llama", "mha")
    tokens, positions = toy.inputs()
    tokens[0, 3] = token
    with pytest.raises(IndexError):
        toy.model(arch, space)(tokens, positions, None)
