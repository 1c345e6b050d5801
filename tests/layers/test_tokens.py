"""Token routing: dispatch = masks; all tokens at one level = the static sub-network; decoding = prefill."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext

from flextron_mcore.choosing import set_subnetwork, use_subnetwork
from flextron_mcore.config import FlextronError
from flextron_mcore.layers import linear
from flextron_mcore.layers.tokens import attention as token_attention
from flextron_mcore.layers.tokens import levels as token_levels
from flextron_mcore.layers.tokens.layer import RoutedLayer
from flextron_mcore.settings.sections import KV_POLICIES
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.layers.test_equality import ATTENTION, KINDS, case


class Fixed:
    """Token routing with given levels [blocks, S, B]; a forward pass reads those from position `start` on."""

    def __init__(self, levels: torch.Tensor, kv_policy: str, sizes: tuple[int, int], masked: bool = False) -> None:
        self.all, self.kv_policy, self.sizes, self.masked, self.start = levels, kv_policy, sizes, masked, 0
        self.leaves: dict[int, torch.Tensor] = {}

    def layer(self, index: int) -> RoutedLayer:
        return RoutedLayer.of(index, lambda block: Fixed.Block(self, block))

    class Block:
        def __init__(self, outer: Fixed, index: int) -> None:
            self.outer, self.index, self.kv_policy, self.masked = outer, index, outer.kv_policy, outer.masked

        def levels(self, hidden, sequence_parallel):
            start = self.outer.start
            return self.outer.all[self.index, start : start + len(hidden)]

        def masks(self, levels):
            mask = (levels[..., None] >= torch.arange(self.outer.sizes[self.index % 2])).float().requires_grad_()
            self.outer.leaves[self.index] = mask
            return mask


def levels_of(space: ElasticSpace, layers: int, seed: int = 0, batch: int = 2, length: int = toy.LENGTH, least: int = 0):
    """Random levels [blocks, S, B], and the number of levels of attention and MLP. least: smallest level; -1 is padding."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (len(space.heads), len(space.ffn_hidden_size))
    rows = [torch.randint(least, sizes[n % 2], (length, batch), generator=generator) for n in range(2 * layers)]
    return torch.stack(rows), sizes


def oracle(model: torch.nn.Module, levels: torch.Tensor, space: ElasticSpace, kv_policy: str, tokens, positions) -> torch.Tensor:
    """Logits by definition: the full model, unused heads and neurons of a token times zero; KV policy own hides unused keys."""
    arch = model.config
    for layer, (attention_SB, mlp_SB) in zip(model.decoder.layers, levels.unflatten(0, (-1, 2)), strict=True):
        widths, heads = torch.tensor(space.ffn_hidden_size), torch.tensor(space.heads)
        neurons = torch.arange(arch.ffn_hidden_size) < widths[mlp_SB.clamp(0)][..., None]
        layer.mlp.observe = lambda hidden, keep=neurons & (mlp_SB >= 0)[..., None]: hidden * keep
        size, queries = arch.kv_channels, arch.num_attention_heads // arch.num_query_groups
        number = torch.arange(arch.num_attention_heads)
        if space.attention_unit == "kv_group":
            used = number < heads[attention_SB.clamp(0)][..., None]
        else:
            used = number % queries < (heads // arch.num_query_groups)[attention_SB.clamp(0)][..., None]
        used = used & (attention_SB >= 0)[..., None]  # [S, B, heads]
        layer.self_attention.linear_proj.observe = lambda x, keep=used, n=size: x * keep.repeat_interleave(n, -1)
        if kv_policy == "own" and space.attention_unit == "kv_group":
            length = len(used)
            causal, itself = torch.ones(length, length, dtype=torch.bool).tril(), torch.eye(length, dtype=torch.bool)
            allowed = used.permute(1, 2, 0)[:, :, None] & causal | itself
            core = layer.self_attention.core_attention
            core.forward = lambda q, k, v, mask=None, a=allowed, c=core, **kwargs: type(c).forward(c, q, k, v, ~a)
    logits = model(tokens, positions, None)
    for layer in model.decoder.layers:
        del layer.mlp.observe, layer.self_attention.linear_proj.observe
        layer.self_attention.core_attention.__dict__.pop("forward", None)
    return logits


def gradients(model: torch.nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dense", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("attention", ATTENTION)
# Token routing refuses sliding windows.
@pytest.mark.parametrize("kind", [name for name, keys in KINDS.items() if "sliding_window" not in keys])
def test_dispatch_is_the_masked_oracle(kind, attention, kv_policy, dense, monkeypatch):
    for module in (token_levels, token_attention):
        monkeypatch.setattr(module, "waits_are_expensive", lambda x: dense)
    arch, space = case(kind, attention)
    model, (tokens, positions) = toy.model(arch, space), toy.inputs()
    for seed, least in ((0, 0), (1, -1)):  # without and with padding
        levels, sizes = levels_of(space, arch.num_layers, seed, least=least)
        expected = oracle(model, levels, space, kv_policy, tokens, positions)
        wanted = gradients(model, expected)
        for masked in (False, True):
            with use_subnetwork(model, Fixed(levels, kv_policy, sizes, masked)):
                with torch.no_grad():
                    torch.testing.assert_close(model(tokens, positions, None), expected, atol=1e-5, rtol=1e-5)
                found = model(tokens, positions, None)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
                for name, gradient in gradients(model, found).items():
                    scale = max(wanted[name].abs().max().item(), 1)
                    torch.testing.assert_close(gradient, wanted[name], atol=1e-5 * scale, rtol=1e-4, msg=f"{masked} {name}")


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("batch", [1, 3])
def test_queries_in_parts_and_weights_in_place(batch, attention, kv_policy, monkeypatch):
    """Results do not depend on the number of queries computed at a time, nor on whether weights are copied."""
    arch, space = case("gpt2", attention)
    model, (tokens, positions) = toy.model(arch, space), toy.inputs(batch)
    levels, sizes = levels_of(space, arch.num_layers, 2, batch=batch, least=-1)
    expected = oracle(model, levels, space, kv_policy, tokens, positions)
    wanted = gradients(model, expected)
    for least, few in ((3, 0), (5, 512), (64, 0)):
        monkeypatch.setattr(token_attention, "_LEAST", least)
        monkeypatch.setattr(linear, "_FEW_TOKENS", few)
        with use_subnetwork(model, Fixed(levels, kv_policy, sizes)):
            with torch.no_grad():
                torch.testing.assert_close(model(tokens, positions, None), expected, atol=1e-5, rtol=1e-5)
            found = model(tokens, positions, None)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            for name, gradient in gradients(model, found).items():
                scale = max(wanted[name].abs().max().item(), 1)
                torch.testing.assert_close(gradient, wanted[name], atol=1e-5 * scale, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_all_tokens_at_one_level_are_the_static_sub_network(attention, kv_policy):
    arch, space = case("llama", attention)
    model, (tokens, positions) = toy.model(arch, space), toy.inputs()
    sizes = (len(space.heads), len(space.ffn_hidden_size))
    for heads in range(sizes[0]):
        level = torch.tensor([heads, (heads + 1) % sizes[1]] * arch.num_layers)
        net = space.uniform(arch, space.heads[level[0]], space.ffn_hidden_size[level[1]])
        routing = Fixed(level[:, None, None].expand(-1, toy.LENGTH, 2), kv_policy, sizes)
        with torch.no_grad():
            with use_subnetwork(model, net):
                expected = model(tokens, positions, None)
            with use_subnetwork(model, routing):
                torch.testing.assert_close(model(tokens, positions, None), expected, atol=1e-5, rtol=0)
    set_subnetwork(model, None)


def decoded(model: torch.nn.Module, routing: Fixed, tokens: torch.Tensor, positions: torch.Tensor, prompt: int):
    """(logits of a prompt and of tokens decoded one by one, logits of one pass over all tokens, inference context)."""
    context, found = StaticInferenceContext(len(tokens), toy.LENGTH), []
    with torch.no_grad(), use_subnetwork(model, routing):
        expected = model(tokens, positions, None)
        for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, toy.LENGTH))]:
            part, routing.start = slice(start, end), start
            logits = model(
                tokens[:, part], positions[:, part], None, inference_context=context, runtime_gather_output=True
            )  # fmt: skip
            found.append(logits[:, -1])
            context.sequence_len_offset = end
            context.enable_decode_mode()
    return torch.stack(found, 1), expected[:, prompt - 1 :], context


@pytest.mark.parametrize("dense", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoding_is_prefill(kind, attention, kv_policy, dense, monkeypatch):
    for module in (token_levels, token_attention):
        monkeypatch.setattr(module, "waits_are_expensive", lambda x: dense)
    arch, space = case(kind, attention)
    model, (tokens, positions) = toy.model(arch, space), toy.inputs()
    levels, sizes = levels_of(space, arch.num_layers, 5)
    found, expected, context = decoded(model, Fixed(levels, kv_policy, sizes), tokens, positions, 7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    if kv_policy == "own" and space.attention_unit == "kv_group":
        for number, caches in context.key_value_memory_dict.items():
            used = levels[2 * (number - 1)]
            for level, cache in enumerate(caches):
                assert (cache.counts_B == (used >= level).sum(0)).all()


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("occurring", [(0, 3), (1, 2), (-1, 2), (1,)])
def test_levels_that_no_token_chooses_cost_no_product(occurring, kv_policy, monkeypatch):
    """Unused levels need no products, unused heads no keys. Results stay the same, with and without a KV cache."""
    arch, space = case("llama", "mha")
    model, (tokens, positions) = toy.model(arch, space), toy.inputs()
    drawn, sizes = levels_of(space, arch.num_layers, 4)
    levels = torch.tensor(occurring)[drawn % len(occurring)]
    shapes: list[list[torch.Size]] = []
    neurons: list[list[torch.Size]] = []

    def watched(hidden, *parts, rows, forward, seen):
        products = forward(hidden, *parts, rows=rows)
        seen.append([product.shape for product in products])
        return products

    with monkeypatch.context() as patch, use_subnetwork(model, Fixed(levels, kv_policy, sizes)):
        for layer in model.decoder.layers:
            linear_qkv = layer.self_attention.linear_qkv
            patch.setattr(linear_qkv, "forward", partial(watched, forward=linear_qkv.forward, seen=shapes))
            patch.setattr(layer.mlp.linear_fc1, "forward", partial(watched, forward=layer.mlp.linear_fc1.forward, seen=neurons))
        found = model(tokens, positions, None)
    routed = [level for level in occurring if level >= 0]
    joint = kv_policy == "full" and occurring[0] == -1  # padded tokens have keys and values but no queries
    assert all(len(row) == len(routed) + joint for row in shapes)
    assert len(neurons) == arch.num_layers and all(len(row) == 2 * len(routed) for row in neurons)  # gate and up projections
    if kv_policy == "full":
        groups = routed[-1] + 1
        lowest = 0 if occurring[0] == -1 else (routed[0] + 1)
        assert all(row[0][-1] == (2 * groups + lowest) * arch.kv_channels for row in shapes)
    actual = gradients(model, found)
    expected = oracle(model, levels, space, kv_policy, tokens, positions)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, wanted in gradients(model, expected).items():
        torch.testing.assert_close(actual[name], wanted, atol=1e-5 * max(wanted.abs().max().item(), 1), rtol=1e-4, msg=name)
    if occurring[0] >= 0:
        levels[:, 7:] = drawn[:, 7:]  # few levels in the prompt, all of them after it
        torch.testing.assert_close(*decoded(model, Fixed(levels, kv_policy, sizes), tokens, positions, 7)[:2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("length, batch, least", [(1, 1, 0), (1, 3, -1), (5, 0, 0), (6, 2, None)])
def test_unusual_inputs(length, batch, least, kv_policy):
    """A sequence of one token, an empty batch, and a batch of padding work."""
    arch, space = case("llama", "mha")
    model = toy.model(arch, space)
    tokens, positions = toy.inputs(batch, length=length)
    levels, sizes = levels_of(space, arch.num_layers, 0, batch, length, 0 if least is None else least)
    if least is None:
        levels = torch.full_like(levels, -1)
    with torch.no_grad(), use_subnetwork(model, Fixed(levels, kv_policy, sizes)):
        found = model(tokens, positions, None)
    assert found.shape[:2] == (batch, length)
    if batch:
        torch.testing.assert_close(found, oracle(model, levels, space, kv_policy, tokens, positions), atol=1e-5, rtol=0)


def test_an_attention_mask_is_refused():
    arch, space = case("llama", "mha")
    model = toy.model(arch, space)
    tokens, positions = toy.inputs(1, length=4)
    levels, sizes = levels_of(space, arch.num_layers, 0, 1, 4, 0)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with use_subnetwork(model, Fixed(levels, "full", sizes)), pytest.raises(FlextronError, match="supports the causal mask only"):
        model(tokens, positions, mask)
