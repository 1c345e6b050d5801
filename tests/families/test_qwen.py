"""Qwen2 and Qwen3: biases on queries, keys and values only; norms of each head's query and key."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families import qwen3
from flextron_mcore.sorting.permutation import sorted_tensors
from flextron_mcore.space import SubNetwork
from tests import hf_toy
from tests.families import random_cases

CLASSES = {2: (Qwen2Config, Qwen2ForCausalLM), 3: (Qwen3Config, Qwen3ForCausalLM)}


def model(version: int, **changes) -> PreTrainedModel:
    config, kind = CLASSES[version]
    values = dict(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=hf_toy.VOCAB, max_position_embeddings=hf_toy.LENGTH, pad_token_id=None,
        **({"head_dim": 8} if version == 3 else {}),
    )  # fmt: skip
    return hf_toy._random(kind(config(**{**values, **changes})))


OPTIONS = {
    "plain": {},
    "tied": dict(tie_word_embeddings=True),
    "one group": dict(num_key_value_heads=1),
    "three heads in a group": dict(num_attention_heads=6, num_key_value_heads=2, head_dim=6),
    "yarn": dict(rope_scaling=dict(random_cases.YARN)),
    "a window that no layer has": dict(use_sliding_window=True, sliding_window=7, max_window_layers=2),
}


@pytest.mark.parametrize("version", CLASSES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_those_of_transformers(options, version, tmp_path):
    hf_toy.check_import(model(version, **options), tmp_path)


def test_the_head_size_of_qwen3_has_a_default_of_its_own():
    given = dict(vocab_size=9, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=8)
    assert qwen3.FAMILY.model_config(given).kv_channels == Qwen3Config(**given).head_dim == 128


def test_norms_of_heads_stay_when_heads_are_sorted(tmp_path):
    """All heads share one norm, so sorting permutes heads but no norm, and the full network stays the same function."""
    theirs = model(3)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", {"granularity": 1})
    groups, neurons = torch.tensor([2, 0, 3, 1]), torch.randperm(40)
    orders = {i: {"kv_groups": groups, "ffn_hidden_size": neurons} for i in range(2)}
    moved, reader = sorted_tensors(info, orders), TensorReader(info)
    for i in range(2):
        attention = f"decoder.layers.{i}.self_attention."
        for name in ("q_layernorm.weight", "k_layernorm.weight"):
            assert torch.equal(moved[attention + name].load(), reader.read(attention + name))
        assert not torch.equal(moved[f"{attention}linear_qkv.weight"].load(), reader.read(f"{attention}linear_qkv.weight"))
    ours = hf_toy.megatron(info)
    state = {name: tensor for name, tensor in ours.state_dict().items() if tensor is not None}
    loaded = {name: moved[_stored(name)].load() for name in state}
    ours.load_state_dict(loaded, strict=False)
    torch.testing.assert_close(hf_toy.logits(ours), hf_toy.logits(theirs), atol=hf_toy.ATOL, rtol=0)


def _stored(name: str) -> str:
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


@pytest.mark.parametrize("version", CLASSES)
def test_a_round_trip_gives_every_tensor_back(version, tmp_path):
    from flextron_mcore.exports.formats import Job, get_format

    info = hf_toy.checkpoint(hf_toy.save(model(version), tmp_path / "hf"), tmp_path / "run")
    (tmp_path / "out").mkdir()
    get_format("hf").write(Job(info, SubNetwork.full(info.model), tmp_path / "out"))
    original, back = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert original.keys() == back.keys() and all(torch.equal(original[name], back[name]) for name in original)


def test_norms_of_heads_need_rmsnorm():
    with pytest.raises(FlextronError, match="model.qk_layernorm=true needs model.normalization=rmsnorm"):
        ModelConfig(1, 8, 2, 9, 9, qk_layernorm=True, normalization="layernorm")


def test_biases_of_qwen3_are_refused(tmp_path):
    config = json.loads((hf_toy.save(model(3), tmp_path) / "config.json").read_text())
    hf_toy.check_refusal(config | {"attention_bias": True}, tmp_path, ["attention_bias=True"])
