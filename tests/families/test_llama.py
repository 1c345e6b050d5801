"""Llama: the imported model has the logits of transformers, for every supported option; others are refused."""

from __future__ import annotations

import math

import pytest
import torch

from flextron_mcore.checkpoint.hf import open_hf
from flextron_mcore.config import FlextronError
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.families import llama
from flextron_mcore.families.rope import longrope_frequencies, yarn_frequencies
from flextron_mcore.space import SubNetwork
from tests import hf_toy
from tests.families.random_cases import YARN

OPTIONS = {
    "gqa": {},
    "mha": dict(num_key_value_heads=8),
    "one group": dict(num_key_value_heads=1),
    "head size by default": dict(head_dim=None),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "epsilon and base": dict(rms_norm_eps=1e-2, rope_theta=500.0),
    "linear": dict(rope_scaling=hf_toy.LINEAR),
    "llama3": dict(rope_scaling=hf_toy.LLAMA3, rope_theta=500.0),
    "yarn": dict(rope_scaling=YARN),
    "yarn, factors": dict(rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}, rope_theta=500.0),
    "longrope, long": dict(rope_scaling=hf_toy.longrope(4, 24), rope_theta=500.0),
    "longrope, short": dict(rope_scaling=hf_toy.longrope(4, 96, factor=4.0), rope_theta=500.0),
    "longrope, attention": dict(rope_scaling=hf_toy.longrope(4, 95, attention_factor=1.3), rope_theta=500.0),
    "yarn, turns": dict(rope_scaling={**YARN, "attention_factor": 1.3, "beta_fast": 8, "beta_slow": 0.5}, rope_theta=500.0),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_those_of_transformers(options, tmp_path):
    hf_toy.check_import(hf_toy.llama(**options), tmp_path)


SCALINGS = {
    "linear": hf_toy.LINEAR,
    "llama3": hf_toy.LLAMA3,
    "yarn": YARN,
    "longrope, long": hf_toy.longrope(4, hf_toy.LENGTH - 1, attention_factor=1.0),
    "longrope, short": hf_toy.longrope(4, hf_toy.LENGTH, attention_factor=1.0),
    "longrope, attention": hf_toy.longrope(4, 24, long_factor=[1.0] * 4),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_rope_scaling_matters_at_the_length_that_is_tested(scaling):
    plain = hf_toy.llama(rope_theta=500.0)
    scaled = hf_toy.llama(rope_scaling=scaling, rope_theta=500.0)
    scaled.load_state_dict(plain.state_dict())
    assert (hf_toy.logits(plain) - hf_toy.logits(scaled)).abs().max() > 0.01


@pytest.mark.parametrize("name", [name for name in OPTIONS if name.startswith(("yarn", "longrope"))])
def test_frequencies_are_those_of_transformers(name, tmp_path):
    theirs = hf_toy.llama(**OPTIONS[name])
    model = open_hf(hf_toy.save(theirs, tmp_path)).model
    rotary = theirs.model.rotary_emb
    assert model.rotary_scale == rotary.attention_scaling
    if model.short_context is None:
        assert yarn_frequencies(model) == rotary.inv_freq.tolist()
        return
    hf_toy.logits(theirs)  # transformers computes the long frequencies in the first pass
    assert longrope_frequencies(model) == (rotary.original_inv_freq.tolist(), rotary.long_inv_freq.tolist())


def test_sharded_weights_without_the_prefix_are_the_same_model(tmp_path):
    theirs = hf_toy.llama(tie_word_embeddings=True)
    whole = open_hf(hf_toy.save(theirs, tmp_path / "whole"))
    hf_toy.save(theirs.model, tmp_path / "shards", max_shard_size="20KB")
    (tmp_path / "shards" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    shards = open_hf(tmp_path / "shards")
    assert shards.sources.keys() == whole.sources.keys()
    assert all(torch.equal(shards.sources[name].read(), whole.sources[name].read()) for name in whole.sources)


BASE = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=50)
LONG = hf_toy.longrope(4, 512)


@pytest.mark.parametrize(
    "written, base, scaling",
    [
        ({}, 10000.0, None),
        ({"rope_theta": 500000, "rope_scaling": None}, 500000.0, None),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0, None),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}}, 7.0, {"type": "linear", "factor": 2.0}),
        ({"rope_parameters": {"rope_theta": 7.0, **hf_toy.LINEAR}}, 7.0, {"type": "linear", "factor": 4.0}),
        (
            {"rope_theta": 7.0, "rope_scaling": hf_toy.LLAMA3},
            7.0,
            {"type": "llama3", **{key: value for key, value in hf_toy.LLAMA3.items() if key != "rope_type"}},
        ),
    ],
)
def test_rope_is_read_as_transformers_4_and_5_write_it(written, base, scaling):
    model = llama.FAMILY.model_config({**BASE, **written})
    assert (model.rotary_base, model.rope_scaling) == (base, scaling)


def test_values_of_the_config():
    model = llama.FAMILY.model_config(
        {
            **BASE,
            "max_position_embeddings": 77,
            "rms_norm_eps": 1e-3,
            "initializer_range": 0.5,
            "attention_dropout": 0.25,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "pretraining_tp": 2,
        }
    )
    assert (model.max_position_embeddings, model.layernorm_epsilon, model.init_method_std) == (77, 1e-3, 0.5)
    assert (model.attention_dropout, model.num_query_groups, model.kv_channels, model.bias) == (0.25, 2, 6, False)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"attention_bias": True}, ["attention_bias=True", "mlp_bias=False"]),
        ({"mlp_bias": True}, ["attention_bias=False", "mlp_bias=True"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["longrope lacks long_factor, short_factor"]),
        ({"rope_scaling": {**LONG, "long_factor": [1.0]}}, ["long_factor must be a list of 4 numbers", "not 1 numbers"]),
        ({"rope_scaling": {**LONG, "long_factor": "2"}}, ["long_factor must be a list, not '2'"]),
        ({"rope_scaling": {**LONG, "short_factor": [1, 1, 0, 1]}}, ["short_factor[2] must be a number of more than 0", "not 0"]),
        ({"rope_scaling": {**LONG, "short_factor": [1, 1, 1, math.inf]}}, ["short_factor[3]", "not inf"]),
        ({"rope_scaling": {**LONG, "short_factor": [1, math.nan, 1, 1]}}, ["short_factor[1]", "not nan"]),
        ({"rope_scaling": {**LONG, "attention_factor": -1.0}}, ["attention_factor must be a number of more than 0"]),
        ({"rope_scaling": {**LONG, "original_max_position_embeddings": 1}}, ["original_max_position_embeddings", "more than 1"]),
        ({"rope_scaling": {**LONG, "short_mscale": 1.2}}, ["type longrope has the unknown key 'short_mscale'"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor"]),
        ({"rope_parameters": {"rope_theta": "many"}}, ["rope_theta", "'many'"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
        ({"hidden_size": None}, ["lacks 'hidden_size'"]),
        ({"vocab_size": "50"}, ["vocab_size", "'50'"]),
        ({"num_hidden_layers": 0}, ["num_layers"]),
        ({"num_key_value_heads": 3}, ["num_query_groups=3"]),
    ],
)
def test_unsupported_options_are_one_clear_line(changes, words, tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], **BASE, **changes}
    hf_toy.check_refusal(config, tmp_path, words)


def test_yarn_that_is_not_truncated_has_no_gguf(tmp_path):
    theirs = hf_toy.llama(rope_scaling={**YARN, "truncate": False})
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run")
    (tmp_path / "out").mkdir()
    with pytest.raises(FlextronError, match='llama.cpp has no YaRN with "truncate": false'):
        get_format("gguf").write(Job(info, SubNetwork.full(info.model), tmp_path / "out"))


def test_llama_cpp_takes_the_short_factors_in_a_short_context(engine, tmp_path):
    """llama.cpp compares its context, 256 tokens here, with the original one; random models have the long factors."""
    theirs = hf_toy.llama(rope_scaling=hf_toy.longrope(4, 256, factor=4.0), rope_theta=500.0)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run")
    (tmp_path / "out").mkdir()
    get_format("gguf").write(Job(info, SubNetwork.full(info.model), tmp_path / "out"))
    found = engine(tmp_path / "out" / "model.gguf").logits(hf_toy.tokens())
    torch.testing.assert_close(found, hf_toy.logits(theirs), atol=hf_toy.ATOL, rtol=0)
