"""Nemotron: squared ReLU, norms whose scale is 1 + weight, heads rotated in part."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import NemotronConfig, NemotronForCausalLM

from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.families import nemotron
from flextron_mcore.space import SubNetwork
from tests import hf_toy


def model(**changes) -> NemotronForCausalLM:
    values = dict(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=8,
        vocab_size=hf_toy.VOCAB, max_position_embeddings=hf_toy.LENGTH,
    )  # fmt: skip
    return hf_toy._random(NemotronForCausalLM(NemotronConfig(**{**values, **changes})))


OPTIONS = {
    "half of a head is rotated": {},
    "a quarter": dict(partial_rotary_factor=0.25),
    "whole heads": dict(partial_rotary_factor=1.0),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "linear": dict(rope_scaling=dict(hf_toy.LINEAR)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_those_of_transformers(options, tmp_path):
    hf_toy.check_import(model(**options), tmp_path)


def test_norms_are_exported_as_they_are_stored(tmp_path):
    """Import and export keep every tensor bit for bit: norms are stored as their scale minus 1."""
    info = hf_toy.checkpoint(hf_toy.save(model(), tmp_path / "hf"), tmp_path / "run")
    (tmp_path / "out").mkdir()
    get_format("hf").write(Job(info, SubNetwork.full(info.model), tmp_path / "out"))
    original, back = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert original.keys() == back.keys() and all(torch.equal(original[name], back[name]) for name in original)


def test_an_absent_share_of_rotated_channels_is_a_half():
    given = dict(vocab_size=9, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=8)
    assert nemotron.FAMILY.model_config(given).rotary_percent == NemotronConfig(**given).rope_parameters["partial_rotary_factor"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_act": "silu"}, ["hidden_act='silu'", "'relu2'"]),
        ({"attention_bias": True}, ["attention_bias=True", "mlp_bias=False"]),
        ({"partial_rotary_factor": 0.4, "rope_parameters": None}, ["model.rotary_percent=0.4 is odd"]),
    ],
)
def test_unsupported_options_are_one_clear_line(changes, words, tmp_path):
    config = json.loads((hf_toy.save(model(), tmp_path) / "config.json").read_text())
    hf_toy.check_refusal(config | changes, tmp_path, words)


@pytest.mark.parametrize("biased", [False, True])
def test_llama_cpp_computes_uniform_networks(biased, engine, tmp_path):
    theirs = model(
        num_attention_heads=6,
        num_key_value_heads=2,
        attention_bias=biased,
        mlp_bias=biased,
        rope_scaling=dict(hf_toy.LINEAR) if biased else None,
    )
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", {"hidden_size": [0.5, 1.0]})
    for name, net in {"half": info.space.uniform(info.model, 3, 20, 24), "full": SubNetwork.full(info.model)}.items():
        (tmp_path / name).mkdir()
        job = Job(info, net, tmp_path / name)
        assert get_format("gguf").write(job)["architecture"] == "nemotron"
        expected = hf_toy.logits(hf_toy.masked(theirs, info.model, net))
        for found in (
            get_format("gguf").logits(job, net, hf_toy.tokens()),
            engine(job.out / "model.gguf").logits(hf_toy.tokens()),
        ):
            torch.testing.assert_close(found, expected, atol=hf_toy.ATOL * max(1.0, expected.std().item()), rtol=0)
