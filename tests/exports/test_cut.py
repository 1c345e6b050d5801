"""Cut: a dense model with the cut tensors has the logits of the sub-network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flextron_mcore.checkpoint.sharding import dealt_axis, to_disk_order
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.exports.cut import cut, cut_config
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork, count_parameters
from tests import toy

# In memory norms are modules of their own; on disk they are stored with the linear layer that follows.
ON_DISK = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
KINDS = {
    "llama": (toy.LLAMA, 2, "kv_group"),
    "llama, query heads": (toy.LLAMA, 2, "query_head"),
    "llama with biases, tied": (dict(toy.LLAMA, bias=True, share_embeddings_and_output_weights=True), 2, "query_head"),
    "gpt2": (toy.GPT2, 4, "kv_group"),
    "layernorm1p, geglu": (dict(toy.GPT2, normalization="layernorm1p", activation="geglu"), 2, "kv_group"),
}


class Reader:
    """Stand-in for the TensorReader of a checkpoint that holds `state`."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def keys(self) -> list[str]:
        return list(self.state)

    def dtype(self, key: str) -> torch.dtype:
        return self.state[key].dtype

    def read(self, key: str, units: int | None = None) -> torch.Tensor:
        return self.state[key]


def stored(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in ON_DISK.items():
            key = key.replace(ours, theirs)
        if isinstance(value, torch.Tensor):
            state[key] = value
    return state


def in_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in tensors.items():
        for ours, theirs in ON_DISK.items():
            key = key.replace(theirs, ours)
        state[key] = value
    return state


def case(kind: str, **axes) -> tuple[CheckpointInfo, torch.nn.Module]:
    values, groups, unit = KINDS[kind]
    arch = toy.config(**values, num_query_groups=groups)
    space = ElasticSpace.build(arch, granularity=1, attention_unit=unit, heads=[2, 4], ffn_hidden_size=[12, 48], **axes)
    return CheckpointInfo(arch, space), toy.model(arch, space)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_computes_what_the_sub_network_computes(kind):
    info, model = case(kind)
    net = info.space.uniform(info.model, 2, 12)
    tensors = cut(info, net, Reader(stored(model)))
    assert sum(torch.Size(t.shape).numel() for t in tensors.values()) == count_parameters(info.model, net)
    loaded = {key: lazy.load() for key, lazy in tensors.items()}
    assert all(loaded[key].shape == lazy.shape and loaded[key].dtype == lazy.dtype for key, lazy in tensors.items())
    small = cut_config(info.model, net)
    assert (small.num_attention_heads, small.ffn_hidden_size, small.kv_channels) == (2, 12, info.model.kv_channels)
    dense = toy.model(small, ElasticSpace.build(small, granularity=1, heads=[1.0], ffn_hidden_size=[1.0]), seed=1)
    dense.load_state_dict(in_memory(loaded), strict=False)
    tokens, positions = toy.inputs()
    with torch.no_grad(), use_subnetwork(model, net):
        torch.testing.assert_close(dense(tokens, positions, None), model(tokens, positions, None), atol=1e-5, rtol=0)


def test_the_full_network_is_the_checkpoint_and_a_part_owns_its_memory():
    info, model = case("llama with biases, tied")
    state = stored(model)
    full = cut(info, SubNetwork.full(info.model), Reader(state))
    assert full.keys() == state.keys()
    assert all(torch.equal(lazy.load(), state[key]) for key, lazy in full.items())
    for lazy in cut(info, info.space.uniform(info.model, 2, 12), Reader(state)).values():
        part = lazy.load()
        assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularities", [(2, 2), (2, 1), (1, 2)])
def test_units_keep_their_disk_order_where_granularity_stays(kind, granularities):
    values, groups, unit = KINDS[kind]
    arch = toy.config(**values, num_query_groups=4 if unit == "kv_group" else groups)
    ours, theirs = granularities
    space = ElasticSpace.build(arch, granularity=ours, attention_unit=unit, heads=[2, 4], ffn_hidden_size=[12, 48])
    info, state = CheckpointInfo(arch, space), stored(toy.model(arch, space))
    net = space.uniform(arch, 2, 12)

    class Dealt(Reader):
        def stored(self, key: str) -> torch.Tensor:
            order = dealt_axis(arch, space, key)
            return to_disk_order(self.state[key], *order)

    small = cut_config(arch, net)
    dense = ElasticSpace.build(small, granularity=theirs, attention_unit=unit, heads=[1.0], ffn_hidden_size=[1.0])
    direct, kept = cut(info, net, Dealt(state), dense), 0
    for key, lazy in cut(info, net, Reader(state)).items():
        order = dealt_axis(small, dense, key)
        kept += direct[key].buckets > 1
        wanted = to_disk_order(lazy.load(), *order) if direct[key].buckets > 1 else lazy.load()
        assert torch.equal(direct[key].load(), wanted), key
    assert (kept > 0) == (ours == theirs)


def test_padding_of_the_vocabulary_is_removed():
    info, model = case("llama")
    state = stored(model)
    padded = {key: torch.cat([t, torch.ones(5, t.shape[1])]) if t.shape[0] == toy.VOCAB else t for key, t in state.items()}
    assert padded["output_layer.weight"].shape[0] == toy.VOCAB + 5
    for key, lazy in cut(info, SubNetwork.full(info.model), Reader(padded)).items():
        assert torch.equal(lazy.load(), state[key])


def test_layers_that_are_skipped_are_left_out_and_the_others_renumbered():
    info, model = case("gpt2", depth=[1, 2])
    state = stored(model)
    full = SubNetwork.full(info.model)
    net = replace(full, layers=(replace(full.layers[0], executed=False), full.layers[1]))
    tensors = cut(info, net, Reader(state))
    assert len(net.executed_layers) == cut_config(info.model, net).num_layers == 1
    assert not any(key.startswith("decoder.layers.1.") for key in tensors)
    for key, lazy in tensors.items():
        assert torch.equal(lazy.load(), state[key.replace("layers.0.", "layers.1.")])


def test_hidden_channels_are_the_first():
    info, model = case("gpt2", hidden_size=[16, 32])
    net = replace(SubNetwork.full(info.model), hidden_size=16)
    tensors = cut(info, net, Reader(stored(model)))
    assert sum(torch.Size(t.shape).numel() for t in tensors.values()) == count_parameters(info.model, net)
    for key, whole in stored(model).items():
        leading = whole[tuple(slice(size) for size in tensors[key].shape)]
        assert torch.equal(tensors[key].load(), leading), key


def test_checkpoints_with_missing_or_undeclared_tensors_are_refused():
    info, model = case("llama")
    state = stored(model)
    net = SubNetwork(32, (LayerChoice(True, 2, 2, 13),) * 2)
    with pytest.raises(FlextronError, match=r"layers\[0\].ffn_hidden_size 13 is not a candidate"):
        cut(info, net, Reader(state))
    with pytest.raises(FlextronError, match="the tensor decoder.layers.0.mlp.linear_fc3.weight is none that this model declares"):
        cut(info, SubNetwork.full(info.model), Reader(state | {"decoder.layers.0.mlp.linear_fc3.weight": torch.ones(2)}))
    del state["decoder.layers.1.mlp.linear_fc2.weight"]
    with pytest.raises(FlextronError, match="lacks the tensor decoder.layers.1.mlp.linear_fc2.weight"):
        cut(info, SubNetwork.full(info.model), Reader(state))


def test_the_config_of_a_network_that_differs_by_layer_is_the_widest():
    arch: ModelConfig = toy.config(num_query_groups=2)
    net = SubNetwork(32, (LayerChoice(True, 1, 2, 48), LayerChoice(True, 2, 1, 12)))
    widest = cut_config(arch, net)
    assert (widest.num_attention_heads, widest.num_query_groups, widest.ffn_hidden_size) == (2, 2, 48)
