"""Tokenizer that a run keeps, and the tokens that end its texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import open_data
from flextron_mcore.data.prepare import prepare_data
from flextron_mcore.data.tokenizer import open_tokenizer
from flextron_mcore.data.tokenizer_files import copy_tokenizer as copy_from_hf
from flextron_mcore.evaluation.generation import generate
from flextron_mcore.exports.gguf import tokenizer as gguf_tokenizer
from flextron_mcore.runs.tokenizers import copy_tokenizer, end_tokens, other_rules
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
        ({"temperature": 0.6}, {"eos_token_id": [3, 5]}, set()),
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


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
    """(imported checkpoint, function that writes end tokens into the model's files and returns transformers' greedy ids)."""
    torch.manual_seed(0)
    folder = hf_toy.save(hf_toy.llama(), tmp_path_factory.mktemp("greedy") / "hf")
    info_ = hf_toy.checkpoint(folder, folder.parent / "run")
    values = json.loads((folder / "config.json").read_text())

    def generated(generation: dict | None, config_ends: object = None) -> list[list[int]]:
        (folder / "config.json").write_text(json.dumps({**values, "eos_token_id": config_ends}))
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        return [theirs.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in PROMPTS]

    return info_, folder, generated


NEW = 24
PROMPTS = [[1, 2, 3], [9, 8, 7, 6], [20]]
# End tokens in generation_config.json (None: no such file) and in config.json. Letters stand for tokens that occur in the texts.
ENDS = [
    *([["a", "b", "c"], "d"], ["a", "d"], ["b", ["a", "c"]], [[], "a"], [None, "a"], [None, ["b", "c", "a"]]),
    *([["a"], None], [["d", 1_000_000], None], ["no end", "a"]),
]


@pytest.mark.parametrize(("generation", "config"), ENDS)
def test_text_ends_where_transformers_ends_it(greedy, generation, config):
    checkpoint, folder, generated = greedy
    whole = generated({})
    letters = {"a": whole[0][5], "b": whole[1][9], "c": whole[2][2], "d": whole[0][8]}
    ids = lambda ends: [letters.get(i, i) for i in ends] if isinstance(ends, list) else letters.get(ends)  # noqa: E731
    expected = generated(None if generation is None else {"eos_token_id": ids(generation)}, ids(config))
    ends = end_tokens(folder, replace(checkpoint, hf_config=json.loads((folder / "config.json").read_text())), 66)
    assert generate(hf_toy.megatron(checkpoint), PROMPTS, None, NEW, ends).ids == expected
    assert generation in ([], "no end") or expected != whole


# Rules in generation_config.json. "first" stands for the first token of a text.
RULES = [
    *({"repetition_penalty": 9.0}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 9}, {"min_length": 20}, {"num_beams": 3}),
    *({"suppress_tokens": ["first"]}, {"begin_suppress_tokens": ["first"]}, {"bad_words_ids": [["first"]]}),
    {"forced_eos_token_id": 9},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_that_are_not_applied_are_named(greedy, rule):
    _, folder, generated = greedy
    text = max(generated({}), key=lambda ids: len(set(ids)))
    late = next(i for i in text[4:] if i not in text[:4])
    ends, rule = {"eos_token_id": late}, json.loads(json.dumps(rule).replace('"first"', str(text[0])))
    plain = generated({**ends, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.0, "suppress_tokens": []})
    assert plain == generated(ends) and not other_rules(folder)
    assert generated({**ends, **rule}) != plain and other_rules(folder) == rule


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
