"""GPT-2: the imported model has the logits of transformers, for every supported option; others are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from flextron_mcore.checkpoint.hf import open_hf
from flextron_mcore.families import gpt2
from tests import hf_toy

OPTIONS = {
    "tied": {},
    "untied": dict(tie_word_embeddings=False),
    "inner size by default, tanh": dict(n_inner=None, activation_function="gelu_pytorch_tanh"),
    "gelu, epsilon": dict(activation_function="gelu", layer_norm_epsilon=1e-2),
    "relu": dict(activation_function="relu"),
    "squared relu": dict(activation_function="relu2"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_those_of_transformers(options, tmp_path):
    hf_toy.check_import(hf_toy.gpt2(**options), tmp_path)


def test_old_files_without_prefix_with_mask_buffers(tmp_path):
    """The first GPT-2 checkpoints have names without prefix, and store the causal mask with every layer."""
    hf_toy.save(hf_toy.gpt2(), tmp_path)
    file = tmp_path / "model.safetensors"
    new = load_file(file)
    old = {name.removeprefix("transformer."): tensor for name, tensor in new.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(old, file)
    hf = open_hf(tmp_path)
    assert hf.sources.keys() == {name for name in new if name != "lm_head.weight"}
    assert torch.equal(hf.sources["transformer.h.1.attn.c_attn.weight"].read(), new["transformer.h.1.attn.c_attn.weight"])


def test_values_of_the_config():
    config = dict(
        n_embd=32, n_layer=3, n_head=4, n_positions=77, vocab_size=50, resid_pdrop=0.2, attn_pdrop=0, initializer_range=0.5
    )
    model = gpt2.FAMILY.model_config(config)
    assert (model.num_layers, model.max_position_embeddings, model.ffn_hidden_size, model.kv_channels) == (3, 77, 128, 8)
    assert (model.hidden_dropout, model.attention_dropout, model.init_method_std) == (0.2, 0.0, 0.5)
    assert model.share_embeddings_and_output_weights


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"scale_attn_weights": False}, ["scale_attn_weights=False"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True"]),
        ({"reorder_and_upcast_attn": True}, ["reorder_and_upcast_attn=True"]),
        ({"add_cross_attention": True}, ["add_cross_attention=True"]),
        ({"activation_function": "silu"}, ["activation_function='silu'", "gelu_new", "relu2"]),
        ({"n_head": 5}, ["hidden_size=32", "num_attention_heads=5"]),
        ({"n_layer": None}, ["lacks 'n_layer'"]),
    ],
)
def test_unsupported_options_are_one_clear_line(changes, words, tmp_path):
    config = {"architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, **changes}
    hf_toy.check_refusal(config, tmp_path, words)
