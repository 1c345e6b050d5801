"""A model with several end tokens and chat templates: import, generated text and export agree with transformers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests import hf_toy, tokenizer_kinds
from tests.stages.conftest import stage

TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
PROMPT = "the best"
NEW = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(Hugging Face directory whose greedy text ends at one of two tokens, ids of the prompt, ids of the text)."""
    folder = tokenizer_kinds.save(
        tokenizer_kinds.llama3(),
        tmp_path_factory.mktemp("hf") / "hf",
        chat_template=[{"name": name, "template": text} for name, text in TEMPLATES.items()],
    )
    torch.manual_seed(0)  # not every random model writes a new token after the third, where its text can end
    theirs = hf_toy.llama(vocab_size=500)
    hf_toy.save(theirs, folder)
    theirs.generation_config = GenerationConfig(pad_token_id=0)
    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    whole = theirs.generate(prompt, max_new_tokens=NEW, do_sample=False)[0, prompt.shape[1] :].tolist()
    end = next(i for i in whole[3:] if i not in whole[:3])
    ends = {"bos_token_id": 1, "eos_token_id": [499 if end != 499 else 498, end], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder, prompt, whole[: whole.index(end) + 1]


def text_of_transformers(folder, prompt: torch.Tensor) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model.generate(prompt, max_new_tokens=NEW, do_sample=False)[0, prompt.shape[1] :].tolist()


def test_text_ends_where_transformers_ends_it_in_every_form(source, tmp_path):
    folder, prompt, expected = source
    assert text_of_transformers(folder, prompt) == expected and 3 < len(expected) < NEW
    stage("import", f"hf={folder}", f"out={tmp_path}/run")
    checkpoint = [f"checkpoint={tmp_path}/run"]
    found = stage("generate", *checkpoint, f"prompt={PROMPT}", f"max_new_tokens={NEW}")
    hf = AutoTokenizer.from_pretrained(folder)
    assert found["tokens"] == len(expected)
    whole, first = (hf.decode(ids, skip_special_tokens=True) for ids in ([*prompt[0], *expected], prompt[0]))
    assert found["texts"][0]["continued"] == whole.removeprefix(first)
    for form in ("hf", "hf_elastic"):
        out = tmp_path / form
        stage("export", *checkpoint, f"format={form}", f"out={out}")
        written = json.loads((out / "generation_config.json").read_text())
        assert written["eos_token_id"] == json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATES
    assert text_of_transformers(tmp_path / "hf", prompt) == expected


# {kind: (its tokenizer, class in its tokenizer_config.json, a model of transformers)}
KINDS = {
    "gpt2": (tokenizer_kinds.gpt2, "GPT2TokenizerFast", hf_toy.gpt2),
    "llama2": (tokenizer_kinds.llama2, "LlamaTokenizerFast", hf_toy.llama),
    "smollm2": (tokenizer_kinds.smollm, "GPT2TokenizerFast", hf_toy.llama),
    "qwen": (tokenizer_kinds.qwen, "Qwen2TokenizerFast", hf_toy.llama),
}


@pytest.mark.parametrize("kind", KINDS)
def test_generated_text_of_every_kind_of_tokenizer(kind, tmp_path, capsys):
    """Prompts, ends and text are those of transformers; a rule of generation_config.json that is not applied is named."""
    build, name, make = KINDS[kind]
    folder = tokenizer_kinds.save(build(), tmp_path / "hf", tokenizer_class=name, unk_token="<unk>")
    hf = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(1)
    hf_toy.save(make(vocab_size=len(hf)), folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    prompts = ["naïve 你好 🙂", "  two  spaces </s>x"]
    ids = [hf(prompt).input_ids for prompt in prompts]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [], "pad_token_id": 0}))
    end = text_of_transformers(folder, torch.tensor([ids[0]]))[3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end], "pad_token_id": 0, "top_k": 50}))
    expected = [text_of_transformers(folder, torch.tensor([each])) for each in ids]
    ends = {"eos_token_id": [end], "pad_token_id": 0, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    stage("import", f"hf={folder}", f"out={tmp_path}/run")
    keys = [f"checkpoint={tmp_path}/run", f"prompt={json.dumps(prompts, ensure_ascii=False)}", f"max_new_tokens={NEW}"]
    found = stage("generate", *keys, "trainer.precision=fp32")
    assert [text["prompt"] for text in found["texts"]] == prompts
    assert found["tokens"] == sum(map(len, expected)) and len(expected[0]) <= 4
    for text, prompt, more in zip(found["texts"], ids, expected, strict=True):
        before, whole = (hf.decode(part, skip_special_tokens=False) for part in (prompt, [*prompt, *more]))
        assert before + text["continued"] == whole
    assert "transformers may write another text: repetition_penalty = 1.05" in capsys.readouterr().out
