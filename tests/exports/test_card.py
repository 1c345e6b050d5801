"""The model card of an export, and the tokenizer copied into it."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from flextron_mcore.checkpoint.store import TABLE_FILE
from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import train_tokenizer
from flextron_mcore.exports.card import NO_TOKENIZER, describe
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.space import SubNetwork, count_parameters, kv_cache_bytes
from tests import hf_toy, routing_toy
from tests.exports.test_hf import networks


@pytest.fixture
def info(tmp_path):
    return hf_toy.checkpoint(hf_toy.save(hf_toy.llama(vocab_size=300), tmp_path / "hf"), tmp_path / "run")


@pytest.fixture
def tokenizer(tmp_path, info):
    folder = tmp_path / "run" / "tokenizer"
    train_tokenizer(["a b c d"], 257).save(folder)
    return folder


def test_the_card_has_parameters_and_memory(info, tmp_path):
    net = networks(info)["by layer"]
    (tmp_path / "out").mkdir()
    job = Job(info, net, tmp_path / "out", "bf16", origin="selector uniform for latency <= 3 ms")
    text = describe(job)
    parameters, full = count_parameters(info.model, net), count_parameters(info.model)
    assert f"| parameters | {parameters:,}, {parameters / full:.1%} of the elastic model's {full:,} |" in text
    assert f"| weights | {2 * parameters:,} bytes in bf16 |" in text
    # 2 layers with 2 and 4 KV groups of 8 channels; keys and values of 2 bytes
    assert kv_cache_bytes(info.model, net, 1, 1) == 192 and "| KV cache | 192 bytes a token in bf16 |" in text
    assert "| chosen by | selector uniform for latency <= 3 ms |" in text
    assert "| 0 | 4 | 2 | 10 |" in text and "| 1 | 8 | 4 | 20 |" in text
    assert "latency |" not in text and NO_TOKENIZER in text
    for name in ("hf", "megatron"):
        out = tmp_path / f"as_{name}"
        out.mkdir()
        get_format(name).write(Job(info, net, out, "bf16", origin=job.origin))
        assert text in (out / "README.md").read_text()


def test_the_card_has_the_predicted_latency(info, tmp_path):
    net = networks(info)["by layer"]
    routing_toy.write_table(info.path, info.path / TABLE_FILE)
    cost = routing_toy.latency(routing_toy.Choices(info.model, info.space))
    share = cost.of(net) / cost.full
    assert 0.5 < share < 0.95
    text = describe(Job(info, net, tmp_path / "out"))
    assert (
        f"| latency | {cost.of(net):.4g} ms predicted, {share:.1%} of the full model's {cost.full:.4g} ms (kind prefill" in text
    )
    (info.path / TABLE_FILE).write_text("{}")
    assert "| latency | not predicted: latency.json" in describe(Job(info, net, tmp_path / "out"))


def test_the_tokenizer_knows_what_the_model_takes(info, tokenizer, tmp_path):
    """The exported tokenizer gives no token type ids: transformers 4 would add them, and Llama's `generate` refuse them."""
    for name, folder in (("hf", "."), ("megatron", "tokenizer")):
        out = tmp_path / f"as_{name}"
        out.mkdir()
        get_format(name).write(Job(info, SubNetwork.full(info.model), out))
        assert NO_TOKENIZER not in (out / "README.md").read_text()
        opened = AutoTokenizer.from_pretrained(out / folder, trust_remote_code=True)
        assert opened("c a b").keys() == {"input_ids", "attention_mask"} and opened.decode(opened("c a b").input_ids) == "c a b"
        config = json.loads((out / folder / "tokenizer_config.json").read_text())
        original = json.loads((tokenizer / "tokenizer_config.json").read_text())
        assert config == original | {"model_input_names": ["input_ids", "attention_mask"]}


@pytest.mark.parametrize("name", ["hf", "megatron"])
@pytest.mark.parametrize(
    "file, text, message",
    [
        ("tokenizer.json", '{"model": {', "tokenizer.json is damaged"),
        ("tokenizer.json", '{"model": {"type": "none", "vocab": {}}}', "tokenizer.json is damaged"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json is damaged: not a JSON object"),
        ("special_tokens_map.json", "", "special_tokens_map.json is damaged"),
        ("tokenizer.json", None, "no tokenizer in it"),
    ],
)
def test_a_broken_tokenizer_is_refused(name, file, text, message, info, tokenizer, tmp_path):
    (tokenizer / file).unlink() if text is None else (tokenizer / file).write_text(text)
    (tmp_path / "out").mkdir()
    with pytest.raises(FlextronError, match=message) as caught:
        get_format(name).write(Job(info, SubNetwork.full(info.model), tmp_path / "out"))
    assert "\n" not in str(caught.value) and str(tokenizer) in str(caught.value)
