"""Static sub-networks with a KV cache: prefill and decoding give the logits of one forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext

from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.space import ElasticSpace, SubNetwork
from tests import toy

CASES = {
    "llama": (toy.LLAMA, 4, "kv_group"),
    "grouped": (toy.LLAMA, 2, "query_head"),
    "gpt2": (toy.GPT2, 4, "kv_group"),
}
PROMPT = 7


@pytest.mark.parametrize("name", CASES)
def test_decoding_is_prefill(name):
    kind, groups, unit = CASES[name]
    arch = toy.config(**kind, num_query_groups=groups)
    axes = dict(heads=[0.5, 1.0], hidden_size=[0.5, 1.0], depth=[1, 2], layer_ranking=[1, 0])
    space = ElasticSpace.build(arch, attention_unit=unit, **axes)
    model = toy.model(arch, space)
    tokens, positions = toy.inputs()
    narrow = replace(toy.random_network(arch, space, 1), hidden_size=32)
    for net in (None, narrow, space.uniform(arch, space.heads[0], 12), space.uniform(arch, space.heads[0], 12, 16, 1)):
        context = StaticInferenceContext(len(tokens), toy.LENGTH)
        found = []
        with torch.no_grad(), use_subnetwork(model, net):
            expected = model(tokens, positions, None)
            for start, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, toy.LENGTH))]:
                part = slice(start, end)
                logits = model(
                    tokens[:, part], positions[:, part], None, inference_context=context, runtime_gather_output=True
                )  # fmt: skip
                found.append(logits[:, -1])
                context.sequence_len_offset = end
                context.enable_decode_mode()
        torch.testing.assert_close(torch.stack(found, 1), expected[:, PROMPT - 1 :], atol=1e-5, rtol=0)
        kept = [key.shape[2] for key, _ in context.key_value_memory_dict.values()]
        assert kept == [layer.kv_groups for layer in (net or SubNetwork.full(arch)).layers if layer.executed]
