"""Phi-3: fused projections; layers of different widths are exported as Mistral's class; longrope is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from flextron_mcore.config import FlextronError
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.space import SubNetwork
from tests import hf_toy


def model(**changes) -> Phi3ForCausalLM:
    values = dict(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=hf_toy.VOCAB, max_position_embeddings=hf_toy.LENGTH, pad_token_id=None,
    )  # fmt: skip
    return hf_toy._random(Phi3ForCausalLM(Phi3Config(**{**values, **changes})))


OPTIONS = {
    "Phi-4": {},
    "Phi-3 mini 4k": dict(num_key_value_heads=6, sliding_window=47),
    "tied, half of a head rotated": dict(tie_word_embeddings=True, partial_rotary_factor=0.5),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_those_of_transformers(options, tmp_path):
    hf_toy.check_import(model(**options), tmp_path)


def test_uniform_networks_stay_phi3_and_others_become_mistral(tmp_path):
    theirs = model(sliding_window=20)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run")
    space = info.space
    differing = SubNetwork(48, tuple(space.layer_choice(info.model, *size) for size in ((3, 10), (6, 40))))
    for name, net in {"Phi3": space.uniform(info.model, 3, 20), "FlextronMistral": differing}.items():
        (tmp_path / name).mkdir()
        figures = get_format("hf").write(Job(info, net, tmp_path / name))
        assert figures["architecture"] == f"{name}ForCausalLM"
        expected = hf_toy.logits(hf_toy.masked(theirs, info.model, net))
        torch.testing.assert_close(hf_toy.logits(hf_toy.load(tmp_path / name)), expected, atol=hf_toy.ATOL, rtol=0)


def test_layers_that_differ_and_rotate_a_part_of_their_heads_are_refused(tmp_path):
    info = hf_toy.checkpoint(hf_toy.save(model(partial_rotary_factor=0.5), tmp_path / "hf"), tmp_path / "run")
    (tmp_path / "out").mkdir()
    net = SubNetwork(48, tuple(info.space.layer_choice(info.model, *size) for size in ((3, 10), (6, 40))))
    with pytest.raises(FlextronError, match="format=hf: the widths differ from layer to layer, and Phi-3 has no class"):
        get_format("hf").write(Job(info, net, tmp_path / "out"))
    with pytest.raises(FlextronError, match="format=hf_elastic: Phi-3 has no class"):
        get_format("hf_elastic").write(Job(info, SubNetwork.full(info.model), tmp_path / "out"))


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn", "linear"])
def test_scalings_are_refused_by_name(kind, tmp_path):
    config = json.loads((hf_toy.save(model(), tmp_path) / "config.json").read_text())
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind in ("longrope", "su") else {"factor": 2.0}
    scaling = {"rope_parameters": None, "rope_scaling": {"type": kind, **factors}}
    hf_toy.check_refusal(config | scaling, tmp_path, [f"'{kind}'", "only default"])
