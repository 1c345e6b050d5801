"""Tokenizer that a run keeps, and the tokens that end its texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import open_data
from flextron_mcore.data.prepare import prepare_data
from flextron_mcore.data.tokenizer import open_tokenizer
from flextron_mcore.data.tokenizer_files import copy_tokenizer as copy_from_hf
from flextron_mcore.evaluation.generation import generate
from flextron_mcore.exports.gguf import tokenizer as gguf_tokenizer
from flextron_mcore.runs.tokenizers import copy_tokenizer, end_tokens
from flextron_mcore.space import ElasticSpace
from tests import hf_toy, tokenizer_kinds, toy

TEMPLATES = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}]


def info(hf_config=None, path: Path | None = None) -> CheckpointInfo:
    arch = toy.config()
    return CheckpointInfo(arch, ElasticSpace.build(arch), hf_config=hf_config, path=path)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [4, 7]}, {"eos_token_id": 3}, {4, 7}),
        ({"eos_token_id": 4}, None, {4}),
        ({"temperature": 0.6}, {"eos_token_id": [3, 5]}, {3, 5}),
        (None, {"eos_token_id": 3}, {3}),
        (None, {}, {9}),
        (None, None, {9}),
    ],
)
def test_tokens_that_end_a_text(tmp_path, generation, config, expected):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_tokens(tmp_path, info(config), 9) == expected


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, "x"]}'])
def test_damaged_generation_config(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(FlextronError, match="generation_config.json"):
        end_tokens(tmp_path, info(), 9)


def test_text_ends_where_transformers_ends_it(tmp_path):
    """Greedy text with a list of ends, each of which occurs."""
    theirs = hf_toy.llama()
    checkpoint = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run")
    ours, prompts = hf_toy.megatron(checkpoint), [[1, 2, 3], [9, 8, 7, 6], [20]]
    whole = generate(ours, prompts, None, 24).ids
    ends = [whole[0][5], whole[1][9], whole[2][2]]
    theirs.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    for prompt, ids in zip(prompts, generate(ours, prompts, None, 24, frozenset(ends)).ids, strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        assert ids == expected.tolist() and len(ids) < 24


def test_choices_of_prepare_reach_the_run(tmp_path):
    """Prompts of a run on data prepared with add_bos=false have no BOS either; templates and ends of the model stay."""
    run = tmp_path / "imported"
    folder = tokenizer_kinds.save(tokenizer_kinds.llama3(), run / "tokenizer", chat_template=TEMPLATES[0]["template"])
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (tmp_path / "in.txt").write_text("some text " * 50)
    source = replace(info(), path=run / "checkpoints" / "iter_0000000")
    for options, bos in (({}, [1]), ({"add_bos": False}, [])):
        data = tmp_path / f"data{len(bos)}"
        data.mkdir()
        prepare_data({"d": [tmp_path / "in.txt"]}, data, tokenizer=folder, **options)
        target = tmp_path / f"run{len(bos)}"
        copy_tokenizer(source, open_data(data), target)
        plain = AutoTokenizer.from_pretrained(folder)("x", add_special_tokens=False).input_ids
        assert open_tokenizer(target).encode_prompts(["x"]) == [[*bos, *plain]]
        assert AutoTokenizer.from_pretrained(target)("x").input_ids == [*bos, *plain]
        assert AutoTokenizer.from_pretrained(target).chat_template == TEMPLATES[0]["template"]
        assert end_tokens(target, source, 2) == {2, 5}


@pytest.mark.parametrize("saved_by", ["transformers 4", "transformers 5"])
def test_several_chat_templates_survive(tmp_path, saved_by):
    folder = tokenizer_kinds.save(tokenizer_kinds.llama3(), tmp_path / "hf", chat_template=TEMPLATES)
    expected = {template["name"]: template["template"] for template in TEMPLATES}
    if saved_by == "transformers 5":
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder := tmp_path / "saved")
        assert list((folder / "additional_chat_templates").iterdir())
    assert copy_from_hf(folder, tmp_path / "copied")
    assert AutoTokenizer.from_pretrained(tmp_path / "copied").chat_template == expected
    open_tokenizer(tmp_path / "copied").save(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == expected
    found = gguf_tokenizer.read(tmp_path / "copied", 600).chat_template
    assert {template["name"]: template["template"] for template in found} == expected
