"""Tokenizers: training, opening, and comparing vocabularies without opening them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flextron_mcore.data import tokenizer as module
from flextron_mcore.data.tokenizer import END_OF_TEXT, SMALLEST_VOCAB, Tokenizer, open_tokenizer, read_vocabulary, train_tokenizer

from .conftest import story


def texts() -> list[str]:
    return [story("train", n) for n in range(200)]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(texts(), 320)


@pytest.fixture(scope="module")
def directory(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    trained.save(path)
    return path


@pytest.fixture(scope="module")
def opened(directory: Path) -> Tokenizer:
    return open_tokenizer(directory)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_every_text_comes_back(opened: Tokenizer, text: str) -> None:
    (ids,) = opened.encode_batch([text])
    assert ids[-1] == opened.eod
    assert (ids[:-1] != opened.eod).all() and (ids < opened.vocab_size).all()
    assert opened.decode(ids[:-1]) == text


def test_special_token_in_a_text_is_text(opened: Tokenizer) -> None:
    (ids,) = opened.encode_batch([f"a {END_OF_TEXT} b"])
    assert list(ids).count(opened.eod) == 1
    assert opened.decode(ids[:-1]) == f"a {END_OF_TEXT} b"


def test_the_vocabulary_has_the_size_that_was_asked(trained: Tokenizer, opened: Tokenizer) -> None:
    assert trained.vocab_size == opened.vocab_size == 320
    assert opened.hf.eos_token == opened.hf.bos_token == END_OF_TEXT
    assert opened.hf.convert_tokens_to_ids(END_OF_TEXT) == opened.eod
    (ids,) = opened.encode_batch(["router router router"])
    assert len(ids) < len("router router router") / 2  # fewer tokens than characters: merges were learnt


def test_directory_has_what_transformers_4_and_5_read(directory: Path) -> None:
    assert {f.name for f in directory.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "is_local" not in config
    assert json.loads((directory / "special_tokens_map.json").read_text()) == {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}


def test_saving_again_changes_nothing(opened: Tokenizer, directory: Path, tmp_path: Path) -> None:
    opened.save(tmp_path)
    again = open_tokenizer(tmp_path)
    assert (again.vocab_size, again.eod) == (opened.vocab_size, opened.eod)
    for file in directory.iterdir():
        assert json.loads((tmp_path / file.name).read_text()) == json.loads(file.read_text())


def test_training_is_deterministic(trained: Tokenizer) -> None:
    assert train_tokenizer(iter(texts()), 320).hf.backend_tokenizer.to_str() == trained.hf.backend_tokenizer.to_str()


def test_few_words_give_a_smaller_vocabulary() -> None:
    small = train_tokenizer(["ab ab"], 1000)
    assert SMALLEST_VOCAB <= small.vocab_size < 300


def test_long_documents_teach_in_pieces(opened: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(module, "PIECE", 100)
    for text in ("".join(texts()) + "x  \n\n  y" * 50, "", "é" * 1000, " " * 1000):
        pieces = list(module._pieces(text))
        assert "".join(pieces) == text and max(map(len, pieces)) <= 100


def test_too_small_a_vocabulary_is_refused(fails) -> None:
    fails(lambda: train_tokenizer(["x"], 256), "vocab_size=256", SMALLEST_VOCAB)


def no_eos(path: Path) -> None:
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("eos_token", "bos_token")})
    )
    (path / "special_tokens_map.json").unlink()


def python_only(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')


def doubled(path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    token = backend.id_to_token(0)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=f"$A {token} $A", special_tokens=[(token, 0)])
    backend.save(str(path / "tokenizer.json"))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "garbage": (lambda path: (path / "tokenizer.json").write_text("{nope"), "not a tokenizer"),
    "no tokenizer.json": (lambda path: (path / "tokenizer.json").unlink(), ""),
    "empty directory": (lambda path: [file.unlink() for file in path.iterdir()], "not a tokenizer"),
    "no end of text": (no_eos, "no end-of-text token"),
    "text twice": (doubled, "its post-processor changes tokens of the text: only post-processors that add"),
    "Python only": (python_only, "has no Rust backend, which encoding a corpus needs"),
}


@pytest.mark.parametrize(("spoil", "reason"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_tokenizer_is_refused(
    directory: Path, tmp_path: Path, fails, spoil: Callable[[Path], object], reason: str
) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    fails(lambda: open_tokenizer(tmp_path), f"tokenizer={tmp_path}", reason)


@pytest.mark.parametrize("name", ["missing", "tokenizer.json"])
def test_a_missing_directory_is_refused(directory: Path, fails, name: str) -> None:
    fails(lambda: open_tokenizer(directory / name), directory / name, "no such directory")


def test_truncation_and_padding_of_the_directory_are_off(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    table["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    table["padding"] = {
        **{"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    text = "a text of more than eight tokens, and of less than fifty"
    tok = open_tokenizer(tmp_path)
    (ids,) = tok.encode_batch([text])
    assert tok.decode(ids[:-1]) == text


def test_ids_beyond_the_count_of_tokens(directory: Path, tmp_path: Path) -> None:
    """The size of a vocabulary whose ids have gaps is the largest id plus 1."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    word = table["model"]["merges"].pop()
    word = "".join(word) if isinstance(word, list) else word.replace(" ", "")
    table["model"]["vocab"][word] = 1000
    table["model"]["merges"].append([word[:1], word[1:]]) if len(word) == 2 else None
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    assert open_tokenizer(tmp_path).vocab_size == 1001


# ---- vocabularies, read without opening the tokenizer ----


def copied(directory: Path, target: Path, change: Callable[[dict], object] = lambda table: None) -> Path:
    """Copy of a tokenizer directory with `change` applied to tokenizer.json, whose keys change their order in any case."""
    shutil.copytree(directory, target)
    table = json.loads((target / "tokenizer.json").read_text())
    change(table)
    (target / "tokenizer.json").write_text(json.dumps(dict(reversed(table.items())), ensure_ascii=True))
    return target


def swap(table: dict) -> None:
    """Exchange the ids of two tokens."""
    vocab = table["model"]["vocab"]
    first, second = list(vocab)[280:282]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def add(i: int) -> Callable[[dict], object]:
    """Function that adds a special token with id `i` to the table of a tokenizer.json."""
    token = {"id": i, "content": "<|added|>", "special": True, "normalized": False}
    return lambda table: table["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))


def test_vocabulary_is_that_of_the_opened_tokenizer(directory: Path, opened: Tokenizer) -> None:
    assert read_vocabulary(directory).tokens == opened.hf.get_vocab()


def test_vocabulary_does_not_depend_on_how_it_is_saved(directory: Path, opened: Tokenizer, tmp_path: Path) -> None:
    backwards = lambda table: table["model"].update(vocab=dict(reversed(table["model"]["vocab"].items())))  # noqa: E731
    ours, other = read_vocabulary(directory), read_vocabulary(copied(directory, tmp_path / "copy", backwards))
    assert other.fingerprint == ours.fingerprint and other.difference(ours) is None
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "saved")
    assert read_vocabulary(tmp_path / "saved").fingerprint == ours.fingerprint


def test_token_added_by_opening_is_no_difference(directory: Path, tmp_path: Path) -> None:
    """transformers saves a token of tokenizer_config.json into tokenizer.json: the vocabulary stays the same."""
    original = copied(directory, tmp_path / "original")
    config = json.loads((original / "tokenizer_config.json").read_text())
    token = {"content": "<pad>", "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    (original / "tokenizer_config.json").write_text(
        json.dumps({**config, "pad_token": "<pad>", "added_tokens_decoder": {"320": token}})
    )
    open_tokenizer(original).save(tmp_path / "saved")
    before, after = read_vocabulary(original), read_vocabulary(tmp_path / "saved")
    assert "<pad>" not in before.tokens and after.tokens["<pad>"] == 320
    assert before.difference(after) is None and after.difference(before) is None


OTHER: dict[str, tuple[Callable[[dict], object], int]] = {
    "two tokens swapped": (swap, 280),
    "a token less": (lambda table: table["model"]["vocab"].popitem(), 319),
    "an added token in the place of another": (lambda table: (table["model"]["vocab"].popitem(), add(319)(table)), 319),
}


@pytest.mark.parametrize(("change", "place"), OTHER.values(), ids=OTHER)
def test_vocabularies_that_differ_are_seen(directory: Path, tmp_path: Path, change: Callable[[dict], object], place: int) -> None:
    ours, other = read_vocabulary(directory), read_vocabulary(copied(directory, tmp_path / "copy", change))
    assert ours.fingerprint != other.fingerprint
    assert ours.difference(other)[1] == other.difference(ours)[1] == place


def test_two_added_tokens_of_one_id_differ(directory: Path, tmp_path: Path) -> None:
    rename = lambda table: (add(320)(table), table["added_tokens"][-1].update(content="<|another|>"))  # noqa: E731
    one, two = (read_vocabulary(copied(directory, tmp_path / name, change)) for name, change in (("a", add(320)), ("b", rename)))
    assert one.difference(two) == ("<|added|>", 320) and two.difference(one) == ("<|another|>", 320)


def test_vocabularies_of_other_kinds_of_directories_are_read(directory: Path, tmp_path: Path) -> None:
    unigram = copied(
        directory, tmp_path / "unigram", lambda t: t.update(model={"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]})
    )
    assert read_vocabulary(unigram).tokens == {"<unk>": 0, "a": 1, END_OF_TEXT: 0}
    (tmp_path / "old").mkdir()  # files of a GPT-2 of transformers 2
    (tmp_path / "old" / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "old" / "merges.txt").write_text("")
    assert read_vocabulary(tmp_path / "old").tokens == {"a": 0, "b": 1}
    (tmp_path / "sentencepiece").mkdir()
    (tmp_path / "sentencepiece" / "tokenizer.model").write_bytes(b"\n\x0b")
    assert read_vocabulary(tmp_path / "sentencepiece") is None


@pytest.mark.parametrize("text", ["", "[]", '{"model": 3}', '{"model": {"vocab": 3}}', '{"added_tokens": [], "model": {}}'])
def test_a_damaged_vocabulary_is_named(tmp_path: Path, fails, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    fails(lambda: read_vocabulary(tmp_path), tmp_path / "tokenizer.json", "is not a tokenizer's vocabulary")
