"""Mistral: names and defaults of its own, and a sliding window that is computed."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from flextron_mcore.checkpoint.hf import open_hf
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import FlextronError
from flextron_mcore.families import mistral
from flextron_mcore.space import SubNetwork, kv_cache_bytes
from tests import hf_toy
from tests.families import random_cases


def model(**changes) -> MistralForCausalLM:
    values = dict(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=8,
        vocab_size=hf_toy.VOCAB, max_position_embeddings=hf_toy.LENGTH, sliding_window=None,
    )  # fmt: skip
    return hf_toy._random(MistralForCausalLM(MistralConfig(**{**values, **changes})))


OPTIONS = {
    "v0.3": {},
    "Nemo": dict(hidden_size=40, head_dim=16),
    "window": dict(sliding_window=7),
    "window of one": dict(sliding_window=1),
    "window beyond the text": dict(sliding_window=500),
    "tied": dict(tie_word_embeddings=True),
    "yarn": dict(rope_scaling=dict(random_cases.YARN)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_those_of_transformers(options, tmp_path):
    hf_toy.check_import(model(**options), tmp_path)


def test_the_window_matters_at_the_length_that_is_tested():
    windowed, plain = model(sliding_window=7), model()
    plain.load_state_dict(windowed.state_dict())
    assert (hf_toy.logits(windowed) - hf_toy.logits(plain)).abs().max() > 0.01


def test_defaults_are_those_of_transformers():
    """An absent window is 4096 tokens in transformers, null is none."""
    given = dict(vocab_size=9, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=8)
    theirs, ours = MistralConfig(**given), mistral.FAMILY.model_config(given)
    assert ours.sliding_window == theirs.sliding_window == 4096
    assert (ours.num_query_groups, ours.max_position_embeddings) == (theirs.num_key_value_heads, theirs.max_position_embeddings)
    assert mistral.FAMILY.model_config({**given, "sliding_window": None}).sliding_window is None


@torch.no_grad()
def test_decoding_with_a_cache_sees_the_window(tmp_path):
    """Token by token with Megatron-Core's KV cache: the logits of the whole text."""
    info = hf_toy.checkpoint(hf_toy.save(model(sliding_window=7), tmp_path / "hf"), tmp_path / "run")
    ours = hf_toy.megatron(info)
    for net in (None, info.space.uniform(info.model, 4, 20)):
        whole, stepwise = decoded(ours, net)
        torch.testing.assert_close(stepwise, whole, atol=hf_toy.ATOL, rtol=0)


def decoded(ours: torch.nn.Module, net: SubNetwork | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last 15 of 24 tokens: (computed at once, computed token by token after a prompt of 10)."""
    from megatron.core.inference.contexts import StaticInferenceContext

    ids = hf_toy.tokens(2, 24)
    with use_subnetwork(ours, net):
        whole = ours(ids, torch.arange(24).expand_as(ids), None)
        context, steps = StaticInferenceContext(2, 24), []
        for start, stop in [(0, 10), *((i, i + 1) for i in range(10, 24))]:
            part, positions = ids[:, start:stop], torch.arange(start, stop).expand(2, -1)
            steps.append(ours(part, positions, None, inference_context=context, runtime_gather_output=True))
            context.sequence_len_offset += stop - start
    # With a cache, some versions of Megatron-Core compute the logits of a prompt's last token only.
    return whole[:, 9:], torch.cat(steps, 1)[:, -15:]


def test_the_cache_holds_the_window(tmp_path):
    arch = open_hf(hf_toy.save(model(sliding_window=7), tmp_path)).model
    full = SubNetwork.full(arch)
    assert kv_cache_bytes(arch, full, 3, 90) == kv_cache_bytes(arch, full, 3, 7) > kv_cache_bytes(arch, full, 3, 6)


def test_generation_of_an_export_with_a_window(tmp_path):
    """Greedy text of hf and hf_elastic, beyond the window, is that of the masked original."""
    from flextron_mcore.exports.formats import Job, get_format

    theirs = model(sliding_window=7)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run")
    space = info.space
    net = SubNetwork(48, tuple(space.layer_choice(info.model, *size) for size in ((4, 10), (8, 40))))
    prompt = hf_toy.tokens(2, 5)
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = hf_toy.masked(theirs, info.model, net).generate(prompt, use_cache=False, **options)
    for name, exported in (("hf", net), ("hf_elastic", SubNetwork.full(info.model))):
        (tmp_path / f"as_{name}").mkdir()
        get_format(name).write(Job(info, exported, tmp_path / f"as_{name}"))
        loaded = hf_toy.load(tmp_path / f"as_{name}")
        if name == "hf_elastic":
            loaded.set_subnetwork(net.to_dict())
        for cached in (True, False):
            assert torch.equal(loaded.generate(prompt, use_cache=cached, **options), expected)


def test_token_routing_refuses_a_window(tmp_path):
    from flextron_mcore.layers.tokens.attention import routed_attention

    info = hf_toy.checkpoint(hf_toy.save(model(sliding_window=7), tmp_path / "hf"), tmp_path / "run")
    attention = hf_toy.megatron(info).decoder.layers[0].self_attention
    with pytest.raises(FlextronError, match="token routing does not support model.sliding_window"):
        routed_attention(attention, None, torch.zeros(3, 1, 48))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sliding_window": 0}, ["sliding_window"]),
        ({"sliding_window": "many"}, ["sliding_window", "'many'"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
    ],
)
def test_unsupported_options_are_one_clear_line(changes, words, tmp_path):
    config = json.loads((hf_toy.save(model(), tmp_path) / "config.json").read_text())
    hf_toy.check_refusal(config | changes, tmp_path, words)
