"""The Transformer Engine backend with a stand-in for the library: arguments passed, modules built, tensors saved.

tests/gpu/test_te.py compares the real library's results on a GPU.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from flextron_mcore import specs
from flextron_mcore.checkpoint.reader import load_model
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.layers.attention import SDPACoreAttention
from flextron_mcore.model import gpt_model, transformer_config
from flextron_mcore.space import ElasticSpace
from tests import toy


class Norm:
    """Stand-in for Transformer Engine's norms: their constructor, and an extra state in the state dict."""

    def __init__(self, hidden_size, eps, sequence_parallel, zero_centered_gamma, params_dtype, device):
        super().__init__(hidden_size, eps=eps, dtype=params_dtype, device=device)
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel

    def get_extra_state(self):
        return torch.zeros(1)

    def set_extra_state(self, state):
        raise AssertionError("must not be asked for")


class RMS(Norm, torch.nn.RMSNorm):
    pass


class Layer(Norm, torch.nn.LayerNorm):
    pass


class Attention(SDPACoreAttention):
    """Stand-in for TEDotProductAttention: refuses other numbers of heads than it was built for, as the library does."""

    def forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None):
        assert (query.shape[2], key.shape[2]) == (self.config.num_attention_heads, self.config.num_query_groups)
        assert attn_mask_type.name != "causal" or query.shape[0] == key.shape[0]
        return super().forward(query, key, value, attention_mask)


@pytest.fixture
def transformer_engine(monkeypatch):
    root, pytorch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    root.pytorch, pytorch.RMSNorm, pytorch.LayerNorm = pytorch, RMS, Layer
    for module in (root, pytorch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.TEDotProductAttention", Attention)
    monkeypatch.setattr(specs, "HAVE_TE", True)
    yield
    sys.modules.pop("flextron_mcore.layers.te", None)


@pytest.mark.parametrize("kind", [toy.LLAMA, toy.GPT2], ids=["llama", "gpt2"])
def test_checkpoints_and_sub_networks_are_those_of_the_local_backend(kind, tmp_path, transformer_engine):
    arch = toy.config(**kind)
    space, config = ElasticSpace.build(arch), transformer_config(arch)
    local = toy.model(arch, space)
    info = CheckpointInfo(arch, space, path=toy.write(local, CheckpointInfo(arch, space), tmp_path))
    other = gpt_model(arch, config, specs.elastic_gpt_block_spec(config, space, backend="te")).eval()
    load_model(other, info)
    assert other.sharded_state_dict().keys() == local.sharded_state_dict().keys()
    assert other.state_dict().keys() == local.state_dict().keys()
    tokens, positions = toy.inputs()
    for net in (None, space.uniform(arch, 2, 24), toy.random_network(arch, space, 3)):
        with use_subnetwork(local, net), use_subnetwork(other, net), torch.no_grad():
            assert torch.equal(other(tokens, positions, None), local(tokens, positions, None))
    core = other.decoder.layers[0].self_attention.core_attention
    assert len(core.attentions) >= 2 and not list(core.children())
    assert not core.attentions[next(iter(core.attentions))].training
    # Decoding: with fewer queries than keys, the last query sees all keys.
    heads = next(iter(core.attentions))
    query, key = (torch.randn(length, 1, count, config.kv_channels) for length, count in zip((2, 5), heads, strict=True))
    expected = local.decoder.layers[0].self_attention.core_attention(query, key, key)
    torch.testing.assert_close(core(query, key, key), expected)
