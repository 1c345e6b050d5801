"""Keys of config.json: what transformers reads differently is refused by name, what it reads under other names is read."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig

from flextron_mcore.config import FlextronError
from flextron_mcore.families import FAMILIES, family_of_config, llama
from tests import hf_toy

LLAMA = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=50)
ROPE = {"rope_theta": 500.0, **hf_toy.LLAMA3}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sliding_window": 4}, ["sliding_window=4 is not supported", "LlamaForCausalLM", "remove from config.json"]),
        ({"qk_norm": True, "logit_scale": 0.5}, ["qk_norm=True, logit_scale=0.5 are not supported"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types="]),
        ({"per_layer_config": {"1": {"intermediate_size": 8}}}, ["per_layer_config="]),
        ({"pruned_heads": {"0": [1]}}, ["pruned_heads="]),
        ({"embedding_multiplier": 12}, ["embedding_multiplier=12"]),
        ({"num_local_experts": 8}, ["num_local_experts=8"]),
        ({"something": False}, ["something=False is not supported"]),
        ({"is_causal": False}, ["is_causal=False is not supported"]),
        ({"is_causal": None}, ["is_causal=null is not supported"]),
        ({"hidden_act": None}, ["hidden_act=null is not supported: leave the key out for transformers' default, 'silu'"]),
        ({"rms_norm_eps": None}, ["rms_norm_eps=null is not supported"]),
        ({"max_position_embeddings": None}, ["max_position_embeddings=null is not supported"]),
        ({"rope_theta": None}, ["rope_theta=null is not supported"]),
        ({"architectures": [], "model_type": None}, ["model_type null is not supported"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 0.5}}, ["of type linear has the unknown key 'mscale'"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["unknown key 'full_attention'"]),
        ({"rope_parameters": [1]}, ["rope_parameters must be an object in braces"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": hf_toy.LINEAR}, ["rope_scaling=", "disagree"]),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, ["rope_theta=10000.0 and rope_parameters.rope_theta"]),
        ({"rope_scaling": {**hf_toy.LLAMA3, "original_max_position_embeddings": 32.5}}, ["must be a whole number", "32.5"]),
    ],
)
def test_keys_that_change_the_function(changes, words, tmp_path):
    hf_toy.check_refusal({"architectures": ["LlamaForCausalLM"], **LLAMA, **changes}, tmp_path, words)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 2, "max_window_layers": 2},
        {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}, "pretraining_tp": 1},
        {"is_causal": True},
        {"tie_word_embeddings": None, "attention_bias": None, "mlp_bias": None, "head_dim": None, "num_key_value_heads": None},
        {"initializer_range": None, "attention_dropout": None, "rope_scaling": None, "rope_parameters": None},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"partial_rotary_factor": 1.0, "pruned_heads": {}, "anything": None, "unsloth_version": "2025.1"},
    ],
)
def test_values_that_do_not(changes):
    assert llama.FAMILY.model_config({**LLAMA, **changes}) == llama.FAMILY.model_config(LLAMA)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_key_that_transformers_writes_by_itself_is_refused(family):
    config = AutoConfig.for_model(family.model_type)
    for values in (config.to_dict(), json.loads(config.to_json_string(use_diff=False)), json.loads(config.to_json_string())):
        family.model_config(values)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_scaling": {**hf_toy.LLAMA3, "original_max_position_embeddings": 32.0}},
        {"rope_scaling": {k: v for k, v in hf_toy.LLAMA3.items() if k[0] != "o"}, "original_max_position_embeddings": 32},
        {"rope_parameters": {**ROPE, "original_max_position_embeddings": 16}, "original_max_position_embeddings": 32},
        {"rope_scaling": hf_toy.LLAMA3, "rope_parameters": ROPE},
        {"rope_scaling": {k: v for k, v in hf_toy.LLAMA3.items() if k[0] != "o"}},
    ],
    ids=["as a float", "beside", "beside and within", "in both spellings", "all positions"],
)
def test_places_of_the_original_positions(scaling, tmp_path):
    """transformers computes the logits; what its configuration says after loading is compared too."""
    folder = hf_toy.save(hf_toy.llama(rope_theta=500.0), tmp_path / "hf")
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "rope_parameters"}
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0, **scaling}))
    theirs = hf_toy.load(folder)
    info = hf_toy.checkpoint(folder, tmp_path / "run")
    assert info.model.rope_scaling["original_max_position_embeddings"] == int(
        theirs.config.rope_parameters["original_max_position_embeddings"]
    )
    found = hf_toy.logits(hf_toy.megatron(info))
    torch.testing.assert_close(found, hf_toy.logits(theirs), atol=hf_toy.ATOL, rtol=0)


@pytest.mark.parametrize(
    "family, names",
    [
        ("llama", {"hidden_act": "swish"}),
        ("gpt2", {"activation_function": "gelu_fast"}),
        ("gpt2", {"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head"}),
        ("gpt2", {"max_position_embeddings": "n_positions", "num_hidden_layers": "n_layer"}),
    ],
)
def test_other_names(family, names, tmp_path):
    """A value or a key under another name that transformers accepts is read like its usual name."""
    folder = hf_toy.save(getattr(hf_toy, family)(), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    changed = config | {name: config.pop(value, value) for name, value in names.items()}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in changed.items() if k in config or k in names}))
    info = hf_toy.checkpoint(folder, tmp_path / "run")
    found = hf_toy.logits(hf_toy.megatron(info))
    torch.testing.assert_close(found, hf_toy.logits(hf_toy.load(folder)), atol=hf_toy.ATOL, rtol=0)


def test_two_names_with_different_values(tmp_path):
    config = dict(architectures=["GPT2LMHeadModel"], n_embd=32, n_layer=2, num_hidden_layers=3, n_head=4, vocab_size=50)
    hf_toy.check_refusal(config, tmp_path, ["n_layer=2 and num_hidden_layers=3 are two names of one key"])


_ROPES = [{"rope_type": ["a"]}, {"rope_type": 5, "factor": 2.0}, {"type": "linear", "factor": float("nan")}]
_ROPES += [{"type": "linear", "factor": -1.0}, {"type": "linear", "factor": "2"}, {"rope_type": "llama3", "factor": 8.0}]
WRONG = [True, 0, -1, 2.5, 1e30, float("nan"), float("inf"), 10**30, "x", "", [], [1], [[1]], {"a": 1}, *_ROPES]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_wrong_value_is_one_line(family):
    """Each key in turn gets values of wrong types and sizes: it is read, or refused in one line, within seconds."""
    config = AutoConfig.for_model(family.model_type).to_dict() | {"model_type": family.model_type}
    base = {key: value for key, value in config.items() if key != "rope_parameters"}
    refused = 0
    for key in [*base, "architectures", "rope_scaling", "rope_parameters", "rope_theta", "quantization_config", "extra"]:
        for value in WRONG:
            try:
                family_of_config({**base, key: value}).model_config({**base, key: value})
            except FlextronError as error:
                refused += 1
                assert "\n" not in str(error) and "Error" not in str(error)
    assert refused > 200


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rms_norm_eps": 0.0}, ["model.layernorm_epsilon must be a number of more than 0, not 0.0"]),
        ({"rope_theta": float("inf")}, ["model.rotary_base must be a number of more than 0, not inf"]),
        ({"attention_dropout": 1.0}, ["model.attention_dropout must be a number of at least 0 and less than 1, not 1.0"]),
        ({"initializer_range": -1.0}, ["model.init_method_std must be a number of at least 0, not -1.0"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, ["model.rope_scaling.factor must be a number of more than 0"]),
        ({"rope_scaling": {"rope_type": 5}}, ["rope_scaling.rope_type must be a text in quotes, not 5"]),
        ({"num_hidden_layers": 10**30}, ["is more than 10000, the most that is possible"]),
    ],
)
def test_numbers_that_no_model_has(changes, words, tmp_path):
    hf_toy.check_refusal({"architectures": ["LlamaForCausalLM"], **LLAMA, **changes}, tmp_path, words)


def test_layers_without_rope_that_are_impossible(tmp_path):
    config = {"architectures": ["SmolLM3ForCausalLM"], **LLAMA, "no_rope_layer_interval": 0}
    hf_toy.check_refusal(config, tmp_path, ["an interval (no_rope_layer_interval) of 0 in 2 layers is not possible"])
