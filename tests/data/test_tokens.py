"""Token ids of documents and prompts are transformers', for every kind of tokenizer, any length and any number of threads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from flextron_mcore.data import long_texts
from flextron_mcore.data.long_texts import encode_long
from flextron_mcore.data.prepare import prepare_data
from flextron_mcore.data.tokenizer import Tokenizer, keep_ids, open_tokenizer, opened_unlike_files, train_tokenizer
from flextron_mcore.data.tokenizer_files import copy_tokenizer
from flextron_mcore.families import FAMILIES
from tests import tokenizer_kinds as kinds
from tests import tricky_texts


def with_eos(backend):
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return backend


# {kind: (its pipeline, class that its tokenizer_config.json names)}
KINDS = {
    "gpt2": (kinds.gpt2, "GPT2TokenizerFast"),
    "llama2": (kinds.llama2, "LlamaTokenizerFast"),
    "llama2, legacy": (kinds.llama2, "LlamaTokenizerFast"),  # a key that transformers 5 does not save
    "llama2, plain class": (kinds.llama2, "PreTrainedTokenizerFast"),
    "llama2, Metaspace at the first": (lambda: kinds.llama2("first"), "PreTrainedTokenizerFast"),
    "llama2, Metaspace always": (lambda: kinds.llama2("always"), "PreTrainedTokenizerFast"),
    "llama3": (kinds.llama3, "PreTrainedTokenizerFast"),
    "smollm2": (kinds.smollm, "GPT2TokenizerFast"),
    "qwen": (kinds.qwen, "Qwen2TokenizerFast"),
    "qwen, plain class": (kinds.qwen, "PreTrainedTokenizerFast"),
    "BOS and EOS": (lambda: with_eos(kinds.llama3()), "PreTrainedTokenizerFast"),
}
ADD_BOS = {*(kind for kind in KINDS if kind.startswith("llama")), "BOS and EOS"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory) -> Path:
    build, name = KINDS[kind]
    keys = {"legacy": True} if kind == "llama2, legacy" else {}
    return kinds.save(build(), tmp_path_factory.mktemp("kind") / "tokenizer", tokenizer_class=name, unk_token="<unk>", **keys)


@pytest.fixture(scope="module")
def opened(folder: Path) -> Tokenizer:
    return open_tokenizer(folder)


def of_transformers(folder: Path, texts: list[str]) -> list[list[int]]:
    theirs = AutoTokenizer.from_pretrained(folder)
    return [theirs(text).input_ids for text in texts]


def ended(kind: str, ids: list[int], eos: int) -> list[int]:
    return ids if kind == "BOS and EOS" else [*ids, eos]


def test_ids_are_those_of_transformers(kind: str, folder: Path, opened: Tokenizer, monkeypatch) -> None:
    texts = kinds.hard_texts()
    assert len(texts) >= 200
    expected = [ended(kind, ids, opened.eod) for ids in of_transformers(folder, texts)]
    for parallel in ("true", "false"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        assert [ids.tolist() for ids in opened.encode_batch(texts)] == expected
    assert [opened.encode_batch([text])[0].tolist() for text in texts] == expected
    bos = opened.hf.bos_token_id
    assert all(
        (ids[:1] == [bos]) == (kind in ADD_BOS or text.startswith("<s>")) for text, ids in zip(texts, expected, strict=True)
    )


def test_prompts_are_documents_without_their_end(kind: str, folder: Path, opened: Tokenizer) -> None:
    texts = kinds.hard_texts()
    for text, ids, expected in zip(texts, opened.encode_prompts(texts), of_transformers(folder, texts), strict=True):
        if kind == "BOS and EOS":
            expected = expected[:-1]
        assert ids == (expected or [opened.hf.bos_token_id]), text


def test_long_texts_are_those_of_the_whole(kind: str, folder: Path, opened: Tokenizer, monkeypatch) -> None:
    """Long texts are encoded in overlapping pieces. They give the tokens of the whole text, wherever their borders fall."""
    text = "".join(kinds.hard_texts()) + kinds.SOURCE
    text = text.replace("<s>", "<S>")  # so that the text spells no BOS token
    backend = opened.hf.backend_tokenizer
    (whole,) = ([i for i in ids] for ids in of_transformers(folder, [text]))
    joints = []
    joint = long_texts._joint
    monkeypatch.setattr(long_texts, "_joint", lambda *given: joints.append(joint(*given)) or joints[-1])
    for shift in range(0, 300, 97):
        part = text[shift:]
        expected = backend.encode(part, add_special_tokens=False).ids
        found = encode_long(backend, part, 600, 300).tolist()
        assert found == expected
    assert sum(place is not None for place in joints) > 0.5 * len(joints)
    monkeypatch.setattr("flextron_mcore.data.tokenizer.PIECE", 4000)
    monkeypatch.setattr(long_texts, "PIECE", 4000)
    assert opened.encode_batch([text, "short"])[0].tolist() == ended(kind, whole, opened.eod)


@pytest.mark.parametrize(
    "text", ["a" * 5000, " " * 5000, "ab" * 3000, "=" * 5000, "🙂" * 3000, "\n" * 4000 + "x", "x" + " y" * 4000]
)
def test_long_monotonous_texts(opened: Tokenizer, text: str) -> None:
    backend = opened.hf.backend_tokenizer
    for piece in (500, 777, 1024):
        assert encode_long(backend, text, piece, 250).tolist() == backend.encode(text, add_special_tokens=False).ids


def test_any_continuation_is_the_rest_of_the_text(folder: Path, opened: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in tricky_texts.TEXTS:
        ids = opened.encode_prompts([text[:20]])[0]
        for cut in range(1, len(ids)):
            kinds.check_continuation(opened, theirs, ids, cut)


@pytest.mark.parametrize("model_type", [family.model_type for family in FAMILIES])
def test_a_copied_tokenizer_has_the_ids_of_its_model(kind: str, folder: Path, model_type: str, tmp_path: Path) -> None:
    """transformers chooses the tokenizer's class by the model type too, which is not beside the copy."""
    source, copy = tmp_path / "hf", tmp_path / "copy"
    shutil.copytree(folder, source)
    (source / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert copy_tokenizer(source, copy)
    if opened := opened_unlike_files(source):
        keep_ids(opened, copy)
    texts = [*tricky_texts.TRICKY["special"], *tricky_texts.TRICKY["ends"], *tricky_texts.TRICKY["forms"]]
    expected = of_transformers(source, texts)
    assert of_transformers(copy, texts) == expected
    opened = open_tokenizer(copy)
    ended_by_eos = [ids[:-1] if opened.suffix else ids for ids in expected]
    assert opened.encode_prompts(texts) == [ids or [opened.hf.bos_token_id] for ids in ended_by_eos]


def test_continuation_keeps_the_first_space(opened: Tokenizer) -> None:
    for prompt, more in (("The cat", " sat on"), ("def", " main():\n"), ("naïve", " café 🙂"), ("a\n", "  b")):
        start = opened.encode_prompts([prompt])[0]
        whole = opened.encode_prompts([prompt + more])[0]
        if whole[: len(start)] == start:
            assert opened.continuation(start, whole[len(start) :]) == more


# ---- add_bos, parse_special_tokens ----


@pytest.mark.parametrize("add_bos", [True, False])
def test_add_bos_and_what_is_saved(folder: Path, kind: str, add_bos: bool, tmp_path: Path) -> None:
    opened = open_tokenizer(folder, add_bos)
    text = "some text"
    plain = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    (ids,) = opened.encode_prompts([text])
    assert ids == ([opened.hf.bos_token_id] if add_bos else []) + plain
    opened.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").encode_prompts([text]) == [ids]
    assert of_transformers(tmp_path / "saved", [text])[0][: len(ids)] == ids


@pytest.mark.parametrize("parse", [True, False, None])
def test_parse_special_tokens(folder: Path, parse: bool | None, tmp_path: Path) -> None:
    opened = open_tokenizer(folder, parse_special_tokens=parse)
    (ids,) = opened.encode_prompts(["a</s>b"])
    assert (opened.eod in ids) == (parse is not False)
    opened.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").encode_prompts(["a</s>b"]) == [ids]
    assert of_transformers(tmp_path / "saved", ["a</s>b"])[0][: len(ids)] == ids


def test_our_own_tokenizer_is_read_by_transformers_as_by_us(tmp_path: Path) -> None:
    ours = train_tokenizer(["a text, and another"] * 9, 300)
    ours.save(tmp_path / "saved")
    texts = [*kinds.hard_texts(), "a<|endoftext|>b"]
    expected = [[*ids, ours.eod] for ids in of_transformers(tmp_path / "saved", texts)]
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == expected
    assert all(ours.eod not in ids[:-1] for ids in expected)


def test_no_bos_token(tmp_path: Path, fails) -> None:
    folder = kinds.save(kinds.gpt2(), tmp_path / "tokenizer", bos_token=None)
    fails(lambda: open_tokenizer(folder, add_bos=True), "add_bos=true", folder, "has no BOS token")
    assert open_tokenizer(folder, add_bos=False).prefix == ()


def test_prepared_documents(kind: str, folder: Path, opened: Tokenizer, tmp_path: Path) -> None:
    """The token files of `prepare`, read by Megatron-Core, hold transformers' ids of every document."""
    texts = [text for text in kinds.hard_texts() if text.strip()]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, options in {"own": {}, "set": {"add_bos": True, "parse_special_tokens": False}}.items():
        out = tmp_path / name
        out.mkdir()
        prepare_data({"d": [tmp_path / "in.jsonl"]}, out, tokenizer=folder, **options)
        found = [document.tolist() for split in ("train", "valid") for document in IndexedDataset(str(out / f"d_{split}"))]
        expected = [ended(kind, ids, opened.eod) for ids in of_transformers(out / "tokenizer", texts)]
        assert sorted(found) == sorted(expected)
        if name == "own":
            assert of_transformers(out / "tokenizer", texts) == of_transformers(folder, texts)


def test_threads_of_another_process(folder: Path, opened: Tokenizer, tmp_path: Path) -> None:
    """A process with two threads writes the ids of this one."""
    code = (
        "import json, sys\nfrom flextron_mcore.data.tokenizer import open_tokenizer\n"
        "from tests.tokenizer_kinds import hard_texts\n"
        "print(json.dumps([ids.tolist() for ids in open_tokenizer(sys.argv[1]).encode_batch(hard_texts())]))"
    )
    if folder.parent.name.endswith("0"):  # one kind is enough: a process takes seconds
        env = {**os.environ, "RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"}
        out = subprocess.run(
            [sys.executable, "-c", code, str(folder)], env=env, capture_output=True, text=True, check=True
        ).stdout
        assert json.loads(out) == [ids.tolist() for ids in opened.encode_batch(kinds.hard_texts())]


def test_empty_texts(opened: Tokenizer) -> None:
    (ids,) = opened.encode_batch([""])
    np.testing.assert_array_equal(ids, [*opened.prefix, opened.eod])
