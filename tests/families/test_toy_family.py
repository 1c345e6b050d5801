"""One declaration adds a family: Toy, a Llama with other names, fused QKV, and fused gate and up projections."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flextron_mcore import families
from flextron_mcore.checkpoint.hf import open_hf
from flextron_mcore.config import FlextronError
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.families import llama
from flextron_mcore.families.family import Names
from flextron_mcore.families.keys import Key, Option, Rope
from flextron_mcore.space import SubNetwork, count_parameters
from tests import hf_toy

TOY = replace(
    llama.FAMILY,
    name="Toy",
    architecture="ToyForCausalLM",
    model_type="toy",
    classes=None,
    keys=(
        Key("words", "vocab_size", int),
        Key("dim", "hidden_size", int),
        Key("inner", "ffn_hidden_size", int),
        Key("depth", "num_layers", int),
        Key("heads", "num_attention_heads", int),
        Key("kv_heads", "num_query_groups", int, None),
        Key("head_dim", "kv_channels", int, None),
        Key("positions", "max_position_embeddings", int),
        Key("epsilon", "layernorm_epsilon", float),
        Option("act", "silu", written=True),
        Rope(),
        Key("bias", "bias", bool, False),
        Key("tied", "share_embeddings_and_output_weights", bool, False),
    ),
    names=Names(
        {
            "embedding.word_embeddings": "net.words",
            "self_attention.linear_qkv.layer_norm": "norm_1",
            "self_attention.linear_qkv": "attn.qkv",
            "self_attention.linear_proj": "attn.out",
            "mlp.linear_fc1.layer_norm": "norm_2",
            "mlp.linear_fc1": "mlp.gate_up",
            "mlp.linear_fc2": "mlp.down",
            "decoder.final_layernorm": "net.norm",
            "output_layer": "head",
        },
        layers="net.blocks.{}.",
    ),
    prefix="net.",
)


def saved(model: torch.nn.Module, folder: Path) -> Path:
    """Write the Toy with the function of the Llama `model` to `folder`, without the package's code."""
    theirs, config, tensors = model.state_dict(), model.config, {}
    for name, new in {"model.embed_tokens": "net.words", "model.norm": "net.norm", "lm_head": "head"}.items():
        tensors[f"{new}.weight"] = theirs[f"{name}.weight"]
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}.", f"net.blocks.{i}."
        for name, parts in {
            "norm_1": ["input_layernorm"],
            "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "attn.out": ["self_attn.o_proj"],
            "norm_2": ["post_attention_layernorm"],
            "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.down": ["mlp.down_proj"],
        }.items():
            tensors[f"{new}{name}.weight"] = torch.cat([theirs[f"{old}{part}.weight"] for part in parts])
    values = {
        "architectures": ["ToyForCausalLM"],
        "model_type": "toy",
        "words": config.vocab_size,
        "dim": config.hidden_size,
        "inner": config.intermediate_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "positions": config.max_position_embeddings,
        "epsilon": config.rms_norm_eps,
        "act": "silu",
        "bias": False,
        "tied": False,
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(autouse=True)
def declared(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, TOY])


def test_one_declaration_imports_exports_and_goes_round(tmp_path):
    theirs = hf_toy.llama()
    source = saved(theirs, tmp_path / "hf")
    info = hf_toy.checkpoint(source, tmp_path / "run")
    model = hf_toy.megatron(info)
    torch.testing.assert_close(hf_toy.logits(model), hf_toy.logits(theirs), atol=hf_toy.ATOL, rtol=0)
    half = info.space.uniform(info.model, 4, 20)
    for name, net in {"full": SubNetwork.full(info.model), "half": half}.items():
        (tmp_path / name).mkdir()
        figures = get_format("hf").write(Job(info, net, tmp_path / name))
        assert figures["architecture"] == "ToyForCausalLM" and figures["parameters"] == count_parameters(info.model, net)
    original, back = load_file(source / "model.safetensors"), load_file(tmp_path / "full" / "model.safetensors")
    assert original.keys() == back.keys() and all(torch.equal(original[name], back[name]) for name in original)
    given, written = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "full"))
    assert {name: written[name] for name in given} == given
    again = hf_toy.checkpoint(tmp_path / "half", tmp_path / "again")
    expected = hf_toy.logits(hf_toy.masked(theirs, info.model, half))
    torch.testing.assert_close(hf_toy.logits(hf_toy.megatron(again)), expected, atol=hf_toy.ATOL, rtol=0)


def test_layers_that_differ_are_exported_as_another_family_with_classes(tmp_path):
    theirs = hf_toy.llama()
    info = hf_toy.checkpoint(saved(theirs, tmp_path / "hf"), tmp_path / "run")
    (tmp_path / "out").mkdir()
    choices = tuple(info.space.layer_choice(info.model, *sizes) for sizes in ((4, 10), (8, 40)))
    net = SubNetwork(48, choices)
    assert get_format("hf").write(Job(info, net, tmp_path / "out"))["architecture"] == "FlextronLlamaForCausalLM"
    expected = hf_toy.logits(hf_toy.masked(theirs, info.model, net))
    torch.testing.assert_close(hf_toy.logits(hf_toy.load(tmp_path / "out")), expected, atol=hf_toy.ATOL, rtol=0)


def test_a_tensor_that_no_declaration_names(tmp_path, monkeypatch):
    source = saved(hf_toy.llama(), tmp_path / "hf")
    info = hf_toy.checkpoint(source, tmp_path / "run")
    fewer = {module: name for module, name in TOY.names.modules.items() if module != "mlp.linear_fc2"}
    monkeypatch.setattr(families, "FAMILIES", [replace(TOY, names=replace(TOY.names, modules=fewer))])
    (tmp_path / "out").mkdir()
    unnamed = "no name is declared for the tensor decoder.layers.0.mlp.linear_fc2.weight"
    with pytest.raises(FlextronError, match=f"ToyForCausalLM: {unnamed}"):
        open_hf(source)
    with pytest.raises(FlextronError, match=f"format=hf: {unnamed}"):
        get_format("hf").write(Job(info, SubNetwork.full(info.model), tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())
