"""Phi-3: fused projections, part of a head rotated, and longrope on both sides of the original context."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from flextron_mcore.evaluation.generation import generate
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.families import phi3
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
    "longrope, long": dict(rope_scaling=hf_toy.longrope(4, 95), original_max_position_embeddings=95),
    "longrope, short": dict(rope_scaling=hf_toy.longrope(4, 96, factor=4.0), original_max_position_embeddings=96),
    "tied, half of a head rotated": dict(tie_word_embeddings=True, partial_rotary_factor=0.5),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_those_of_transformers(options, tmp_path):
    hf_toy.check_import(model(**options), tmp_path)


def test_uniform_networks_stay_phi3_unless_its_class_refuses_them(tmp_path):
    """transformers' class wants one factor of longrope for each pair of channels of a head of hidden_size / heads channels."""
    theirs = model(rope_scaling=hf_toy.longrope(3, 50), original_max_position_embeddings=50, partial_rotary_factor=0.75)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", {"hidden_size": [0.5, 1.0]})
    space = info.space
    differing = SubNetwork(48, tuple(space.layer_choice(info.model, *size) for size in ((3, 10), (6, 40))))
    nets = {"Phi3": space.uniform(info.model, 3, 20, 24), "FlextronPhi3": space.uniform(info.model, 3, 20), "differ": differing}
    for name, net in nets.items():
        (tmp_path / name).mkdir()
        figures = get_format("hf").write(Job(info, net, tmp_path / name))
        assert figures["architecture"] == f"{name.replace('differ', 'FlextronPhi3')}ForCausalLM"
        expected = hf_toy.logits(hf_toy.masked(theirs, info.model, net))
        torch.testing.assert_close(hf_toy.logits(hf_toy.load(tmp_path / name)), expected, atol=hf_toy.ATOL, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_exported_classes_take_an_attention_implementation(implementation, tmp_path):
    theirs = model(sliding_window=20)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run")
    net = SubNetwork(48, tuple(info.space.layer_choice(info.model, *size) for size in ((3, 10), (6, 40))))
    expected = hf_toy.logits(hf_toy.masked(theirs, info.model, net))
    for name in ("hf", "hf_elastic"):
        (tmp_path / f"{name}_out").mkdir()
        get_format(name).write(Job(info, net if name == "hf" else SubNetwork.full(info.model), tmp_path / f"{name}_out"))
        found = copy.deepcopy(hf_toy.load(tmp_path / f"{name}_out"))
        found.set_attn_implementation(implementation)
        if name == "hf_elastic":
            found.set_subnetwork(net.to_dict())
        assert found.base_model.layers[0].self_attn.config._attn_implementation == implementation
        torch.testing.assert_close(hf_toy.logits(found), expected, atol=hf_toy.ATOL, rtol=0)


def test_greedy_text_that_outgrows_the_original_context_is_that_of_transformers(tmp_path):
    """transformers computes the whole text again with the long factors; so do `generate` and exports of either kind."""
    theirs = model(
        rope_scaling=hf_toy.longrope(4, 40, long_factor=[1.0, 9.0, 25.0, 49.0]),
        rope_theta=50.0,
        original_max_position_embeddings=40,
        eos_token_id=None,
    )
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run")
    full, greedy = SubNetwork.full(info.model), dict(max_new_tokens=16, do_sample=False, eos_token_id=None)
    ids = hf_toy.tokens()[0]
    expected = {start: theirs.generate(ids[None, :start], **greedy)[0, start:].tolist() for start in (33, 40, 41)}
    whole = theirs.generate(ids[None, :33], use_cache=False, **greedy)[0, 33:].tolist()
    assert expected[33] == whole and len(set(map(tuple, expected.values()))) == 3
    prompts = [ids[:start].tolist() for start in expected]
    assert generate(hf_toy.megatron(info), prompts, None, 16).ids == list(expected.values())
    (tmp_path / "out").mkdir()
    get_format("hf_elastic").write(Job(info, full, tmp_path / "out"))
    exported = hf_toy.load(tmp_path / "out")
    assert {start: exported.generate(ids[None, :start], **greedy)[0, start:].tolist() for start in expected} == expected


def test_longrope_by_its_older_names(tmp_path):
    """su and yarn are names of longrope in Phi-3 only; the original context is 4096 unless config.json says otherwise."""
    config = json.loads((hf_toy.save(model(max_position_embeddings=8192), tmp_path) / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith(("rope_", "original_"))}
    factors = {name: hf_toy.longrope(4, 1)[name] for name in ("short_factor", "long_factor")}
    found = [
        phi3.FAMILY.model_config(config | {"rope_scaling": {"type": kind, **factors}}) for kind in ("longrope", "su", "yarn")
    ]
    assert found[0] == found[1] == found[2] and found[0].short_context == 4096
    theirs = Phi3ForCausalLM(Phi3Config(**config, rope_scaling={"type": "longrope", **factors}))
    assert found[0].rotary_scale == theirs.model.rotary_emb.attention_scaling > 1


REFUSED = {
    "linear": ({"type": "linear", "factor": 2.0}, ["'linear'", "only default, longrope"]),
    "two original contexts": (hf_toy.longrope(4, 50), ["original_max_position_embeddings is 4096", "50 for its rotary"]),
    "too few factors": (
        {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 4},
        ["short_factor must be a list of 4 num"],
    ),
    "no factors": ({"type": "longrope"}, ["longrope lacks long_factor, short_factor"]),
}


@pytest.mark.parametrize("scaling, words", REFUSED.values(), ids=REFUSED)
def test_other_scalings_are_one_clear_line(scaling, words, tmp_path):
    config = json.loads((hf_toy.save(model(), tmp_path) / "config.json").read_text())
    hf_toy.check_refusal(config | {"rope_parameters": None, "rope_scaling": scaling}, tmp_path, words)
