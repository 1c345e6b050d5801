"""The table of a model's tensors: parameter counts, parts on ranks, tensors that an axis adds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.families import llama
from flextron_mcore.families.tensors import count, declare, find, of_model, of_network
from flextron_mcore.space import LayerChoice, SubNetwork
from tests import toy

NET = SubNetwork(16, (LayerChoice(True, 1, 2, 12), LayerChoice(False, 0, 0, 0), LayerChoice(True, 2, 1, 48)))


@pytest.mark.parametrize("family", [toy.LLAMA, toy.GPT2], ids=["llama", "gpt2"])
def test_the_counter_is_the_sum_of_the_shapes(family):
    arch = toy.config(num_layers=3, num_query_groups=2, **family)
    for net in (NET, SubNetwork.full(arch)):
        placed = list(of_network(arch, net, SubNetwork.full(arch)))
        assert count(arch, net) == sum(math.prod(tensor.shape) for tensor in placed)
        assert count(arch, net, embeddings=False) == sum(math.prod(t.shape) for t in placed if not t.tensor.embedding)


def test_names_of_a_cut_and_of_the_whole():
    arch = toy.config(num_layers=3, num_query_groups=2)
    placed = {tensor.name: tensor for tensor in of_network(arch, NET, SubNetwork.full(arch))}
    assert placed["decoder.layers.1.mlp.linear_fc2.weight"].source == "decoder.layers.2.mlp.linear_fc2.weight"
    assert placed["decoder.layers.0.self_attention.linear_qkv.weight"].shape == (1 * (2 + 2) * 8, 16)
    assert not any(name.startswith("decoder.layers.2.") for name in placed)
    assert find("decoder.layers.17.mlp.linear_fc1.bias").name == "mlp.linear_fc1.bias"
    assert find("decoder.layers.17.mlp.linear_fc3.weight") is None


def test_ranks_share_units_and_tokens():
    arch = toy.config(num_query_groups=2, bias=True)
    layer = SubNetwork.full(arch).layers[0]
    parts = {t.name: t.numel(arch, 32, layer) / t.numel(arch, 32, layer, ranks=2) for t in of_model(arch, "layer")}
    shared = {name for name, part in parts.items() if part == 2}
    assert set(parts.values()) == {1, 2} and shared == {name for name in parts if "norm" not in name} - {
        "self_attention.linear_proj.bias",
        "mlp.linear_fc2.bias",
    }
    (words,) = (t for t in of_model(arch, "before") if t.name == "embedding.word_embeddings.weight")
    assert words.numel(arch, 32, ranks=2) == -(-toy.VOCAB // 2) * 32


def test_tensors_that_an_axis_brings():
    @dataclass(frozen=True)
    class Widened:
        executed: bool
        kv_groups: int
        query_heads_per_group: int
        ffn_hidden_size: int
        adapter: int

    arch = toy.config(num_query_groups=2)
    extra = declare({"adapter.down.weight": ("adapter", "hidden_size"), "adapter.up": ("hidden_size", "adapter")})
    net, full = (SubNetwork(16, tuple(Widened(True, 2, 2, 48, width) for width in widths)) for widths in ((3, 5), (8, 8)))
    assert count(arch, net, extra=extra) == count(arch, net) + 2 * 16 * (3 + 5)
    placed = {tensor.name: tensor for tensor in of_network(arch, net, full, extra)}
    down = placed["decoder.layers.1.adapter.down.weight"]
    assert (down.sizes, down.whole) == (((5,), (16,)), ((8,), (16,)))
    for tensor in (down, placed["decoder.layers.1.adapter.up"]):  # no format declares names for added tensors
        with pytest.raises(FlextronError, match=f"here: no name is declared for the tensor {tensor.name}"):
            llama.FAMILY.names.map([tensor], "here")
