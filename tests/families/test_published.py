"""Public checkpoints' config.json, with all keys as published and smaller sizes: the logits of transformers, or one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import hf_toy

SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    vocab_size=hf_toy.VOCAB, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
COMMON = dict(
    attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, rms_norm_eps=1e-5, rope_theta=1000000.0,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.45.0", use_cache=True,
)  # fmt: skip
GPT2_SIZES = dict(n_embd=64, n_head=8, n_layer=4, vocab_size=hf_toy.VOCAB, bos_token_id=1, eos_token_id=1)
GPT2 = dict(
    activation_function="gelu_new", attn_pdrop=0.1, embd_pdrop=0.1, initializer_range=0.02, layer_norm_epsilon=1e-5, n_ctx=1024,
    n_positions=1024, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True,
    summary_type="cls_index", summary_use_proj=True,
)  # fmt: skip
LLAMA3 = {**hf_toy.LLAMA3, "original_max_position_embeddings": 8192}
LLAMA = dict(attention_bias=False, mlp_bias=False, pretraining_tp=1)
QWEN = dict(rms_norm_eps=1e-6, max_window_layers=28, sliding_window=131072, use_sliding_window=False)
QWEN3 = dict(attention_bias=False, head_dim=16, rms_norm_eps=1e-6, rope_scaling=None, sliding_window=None)
QWEN3 |= dict(max_window_layers=28, use_sliding_window=False)
SMOLLM3 = dict(LLAMA, layer_types=["full_attention"] * 4, max_position_embeddings=65536, max_window_layers=28, pad_token_id=4)
SMOLLM3 |= dict(no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0], sliding_window=None, use_sliding_window=False)
PHI3 = dict(attention_bias=False, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, embd_pdrop=0.0, resid_pdrop=0.0)
PHI3 |= dict(max_position_embeddings=4096, original_max_position_embeddings=4096, pad_token_id=3, rope_theta=10000.0)
PHI4_MINI = PHI3 | dict(full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False, sliding_window=262144)
PHI4_MINI |= dict(partial_rotary_factor=0.75, tie_word_embeddings=True)
NEMOTRON = dict(
    LLAMA, rms_norm_eps=None, head_dim=8, hidden_act="relu2", norm_eps=1e-5, partial_rotary_factor=0.5, rope_theta=10000
)
MINISTRAL_TYPES = ["full_attention", *["sliding_attention"] * 3]
LONGROPE = {"long_factor": [1.0, 1.118320672, 32.0], "short_factor": [1.0, 1.0, 1.0], "type": "longrope"}
PHI3_128K = {"long_factor": [1.05, 1.11, 19.2, 64.4], "short_factor": [1.0, 1.02, 1.3, 2.8], "type": "longrope"}

SAME = {
    "Llama-3.2-1B": ("Llama", dict(LLAMA, head_dim=8, rope_scaling={**LLAMA3, "factor": 32.0}, tie_word_embeddings=True)),
    "Llama-3.1-8B-Instruct": ("Llama", dict(LLAMA, eos_token_id=[2, 3, 4], rope_scaling=LLAMA3, max_position_embeddings=131072)),
    "Llama-3.1-Minitron-4B-Width": ("Llama", dict(LLAMA, head_dim=16, rope_scaling=LLAMA3)),
    "SmolLM2-135M-Instruct": (
        "Llama",
        {
            **LLAMA,
            **dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, is_llama_config=True, rope_interleaved=False),
            **dict(rope_scaling=None, rope_theta=100000, pad_token_id=2, tie_word_embeddings=True),
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        },
    ),
    "deepseek-coder-1.3b": ("Llama", dict(rope_scaling={"factor": 4.0, "type": "linear"}, rope_theta=100000)),
    "Mistral-7B-v0.1": ("Mistral", dict(rope_theta=10000.0, sliding_window=16)),
    "Mistral-7B-v0.3": ("Mistral", dict(sliding_window=None)),
    "Mistral-Nemo": ("Mistral", dict(head_dim=16, max_position_embeddings=1024000, sliding_window=None)),
    "Ministral-8B": ("Ministral", dict(head_dim=8, layer_types=MINISTRAL_TYPES, sliding_window=16, rope_theta=100000000.0)),
    "Qwen2.5-0.5B": ("Qwen2", dict(QWEN, sliding_window=32768, tie_word_embeddings=True, use_mrope=False)),
    "Qwen2.5-7B-Instruct, YaRN": (
        "Qwen2",
        dict(QWEN, rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}),
    ),
    "Qwen2 with windows": ("Qwen2", dict(QWEN, max_window_layers=2, sliding_window=16, use_sliding_window=True)),
    "Qwen3-0.6B": ("Qwen3", dict(QWEN3, rope_theta=1000000, tie_word_embeddings=True)),
    "Qwen3-4B-Instruct-2507": ("Qwen3", dict(QWEN3, max_position_embeddings=262144, rope_theta=5000000)),
    "SmolLM3-3B, YaRN": (
        "SmolLM3",
        dict(SMOLLM3, rope_scaling={"factor": 2.0, "original_max_position_embeddings": 65536, "type": "yarn"}),
    ),
    "SmolLM3-3B": ("SmolLM3", dict(SMOLLM3, bos_token_id=None, rope_scaling=None, rope_theta=5000000.0)),
    "Phi-3-mini-4k-instruct": ("Phi3", dict(PHI3, num_key_value_heads=8, rope_scaling=None, sliding_window=16)),
    "Phi-4": ("Phi3", dict(PHI3, max_position_embeddings=16384, rope_scaling=None, rope_theta=250000, sliding_window=None)),
    "Phi-4-mini without longrope": ("Phi3", dict(PHI4_MINI, rope_scaling=None)),
    "Phi-4-mini": ("Phi3", dict(PHI4_MINI, max_position_embeddings=131072, rope_scaling=LONGROPE)),
    "Phi-4-mini, after its original context": (
        "Phi3",
        dict(PHI4_MINI, max_position_embeddings=3072, original_max_position_embeddings=90, rope_scaling=LONGROPE),
    ),
    "Phi-3-mini-128k": (
        "Phi3",
        dict(PHI3, max_position_embeddings=131072, num_key_value_heads=8, rope_scaling=PHI3_128K, sliding_window=262144),
    ),
    "Minitron-4B-Base": ("Nemotron", dict(NEMOTRON, kv_channels=8, rope_percent=0.5, rope_scaling=None)),
    "Nemotron, llama3 in part of a head": (
        "Nemotron",
        dict(NEMOTRON, rope_theta=None, rope_parameters={**LLAMA3, "partial_rotary_factor": 0.5, "rope_theta": 10000.0}),
    ),
    "Nemotron, YaRN in part of a head": ("Nemotron", dict(NEMOTRON, rope_scaling={"factor": 2.0, "type": "yarn"})),
    "gpt2": ("GPT2", dict(GPT2, task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}})),
    "gpt2-medium": ("GPT2", dict(GPT2, n_special=0, predict_special_tokens=True)),
    "gpt2-xl": ("GPT2", dict(GPT2, output_past=True)),
    "distilgpt2": ("GPT2", dict(GPT2, _num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})),
}
CHUNKS = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
REFUSED = {
    "Qwen2.5-7B-Instruct-1M": ("Qwen2", dict(QWEN, dual_chunk_attention_config=CHUNKS), "dual_chunk_attention_config="),
    "Mistral with windows in some layers": ("Mistral", dict(layer_types=MINISTRAL_TYPES, sliding_window=16), "layer_types="),
    "Llama with windows": ("Llama", dict(layer_types=MINISTRAL_TYPES, sliding_window=16), "layer_types="),
}


def published(family: str, more: dict[str, Any], folder: Path) -> dict[str, Any]:
    """config.json in `folder`."""
    gpt2 = family == "GPT2"
    names = dict(architectures=["GPT2LMHeadModel" if gpt2 else f"{family}ForCausalLM"], model_type=family.lower())
    config = names | (GPT2_SIZES if gpt2 else SIZES | COMMON | {"max_position_embeddings": 32768}) | more
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("family, more", SAME.values(), ids=SAME)
def test_logits_are_those_of_transformers(family, more, tmp_path):
    config = published(family, more, tmp_path)
    theirs = hf_toy._random(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32))
    hf_toy.save(theirs, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))  # transformers wrote it with its own keys
    ours = hf_toy.megatron(hf_toy.checkpoint(tmp_path, tmp_path / "run", {"heads": None}))
    expected = hf_toy.logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())
    assert expected.std() > 0.1
    scale = max(1.0, expected.std().item())
    torch.testing.assert_close(hf_toy.logits(ours) / scale, expected / scale, atol=hf_toy.ATOL, rtol=0)


@pytest.mark.parametrize("family, more, words", REFUSED.values(), ids=REFUSED)
def test_others_are_one_clear_line(family, more, words, tmp_path):
    hf_toy.check_refusal(published(family, more, tmp_path), tmp_path, [words])
