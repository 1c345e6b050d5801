"""SmolLM3: some layers do not rotate queries and keys."""

from __future__ import annotations

import pytest
import torch
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from flextron_mcore.exports.cut import cut_config
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.families import smollm3
from flextron_mcore.space import SubNetwork
from tests import hf_toy


def model(**changes) -> SmolLM3ForCausalLM:
    values = dict(
        hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=hf_toy.VOCAB, max_position_embeddings=hf_toy.LENGTH, pad_token_id=None, bos_token_id=3, eos_token_id=5,
    )  # fmt: skip
    return hf_toy._random(SmolLM3ForCausalLM(SmolLM3Config(**{**values, **changes})))


OPTIONS = {
    "every fourth": {},
    "every second, untied": dict(no_rope_layer_interval=2, tie_word_embeddings=False),
    "listed, biases": dict(no_rope_layers=[0, 1, 1, 0], attention_bias=True, mlp_bias=True),
    "all rotate": dict(no_rope_layers=[1, 1, 1, 1]),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_those_of_transformers(options, tmp_path):
    hf_toy.check_import(model(**options), tmp_path)


def test_defaults_are_those_of_transformers():
    given = dict(vocab_size=9, hidden_size=64, intermediate_size=8, num_hidden_layers=6, num_attention_heads=8)
    theirs, ours = SmolLM3Config(**given), smollm3.FAMILY.model_config(given)
    assert [1 - skipped for skipped in ours.no_rope_freq] == theirs.no_rope_layers == [1, 1, 1, 0, 1, 1]
    assert (ours.rotary_base, ours.num_query_groups) == (theirs.rope_parameters["rope_theta"], theirs.num_key_value_heads)


def test_layers_keep_their_rotation_when_others_are_skipped(tmp_path):
    theirs = model()
    info = hf_toy.checkpoint(
        hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", {"depth": [2, 4], "layer_ranking": [3, 1, 0, 2]}
    )
    net = info.space.uniform(info.model, 4, 20, None, 2)
    assert info.model.no_rope_freq == (0, 0, 0, 1) and cut_config(info.model, net).no_rope_freq == (0, 1)
    (tmp_path / "out").mkdir()
    figures = get_format("hf").write(Job(info, net, tmp_path / "out"))
    assert figures["architecture"] == "SmolLM3ForCausalLM"
    expected = hf_toy.logits(hf_toy.masked(theirs, info.model, net))
    torch.testing.assert_close(hf_toy.logits(hf_toy.load(tmp_path / "out")), expected, atol=hf_toy.ATOL, rtol=0)
    assert SubNetwork.full(info.model).depth == 4
