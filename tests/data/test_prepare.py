"""`prepare_data`: training and validation text, the tokenizer's sample, token files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from flextron_mcore.config import FlextronError
from flextron_mcore.data import prepare as module
from flextron_mcore.data import tokenizer as tokenizer_module
from flextron_mcore.data.builtin import builtin_inputs
from flextron_mcore.data.corpus import Corpus, open_corpus
from flextron_mcore.data.prepare import parse_inputs, prepare_data
from flextron_mcore.data.shards import Part
from flextron_mcore.data.split import Documents
from flextron_mcore.data.split import split as split_documents
from flextron_mcore.data.tokenizer import END_OF_TEXT, open_tokenizer, train_tokenizer

from .conftest import story


class InMemory(Corpus):
    """Corpus of texts in memory."""

    def __init__(self, texts: list[str], domain: str = "d") -> None:
        super().__init__(domain, [])
        self.texts = texts

    def __iter__(self):
        return iter(self.texts)


def parts(*domains: list[str], fraction: float = 0.1, seed: int = 0) -> list:
    """Split of domains d0, d1, ..."""
    return module._read({f"d{i}": InMemory(texts, f"d{i}") for i, texts in enumerate(domains)}, fraction, seed, lambda line: None)


def splits(*domains: list[str], fraction: float = 0.05, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """(training texts, validation texts) of each domain."""
    found = [list(part.texts()) for part in parts(*domains, fraction=fraction, seed=seed)]
    return [([t for _, valid, t in entries if not valid], [t for _, valid, t in entries if valid]) for entries in found]


def split(texts: list[str], fraction: float = 0.05, seed: int = 0) -> tuple[list[str], list[str]]:
    """(training texts, validation texts) of one domain."""
    return splits(texts, fraction=fraction, seed=seed)[0]


def documents(prefix: Path, tokenizer: Path) -> list[str]:
    """Texts in a pair of token files. Asserts that each ends with the end-of-document token and has no other."""
    tok = open_tokenizer(tokenizer)
    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    for ids in dataset:
        assert ids[-1] == tok.eod and (ids[:-1] != tok.eod).all()
    return [tok.decode(ids[:-1]) for ids in dataset]


# ---- the user's input= ----


def test_inputs_are_parsed_by_domain(tmp_path: Path) -> None:
    (tmp_path / "v1.5").mkdir()
    assert parse_inputs("x/wiki.jsonl.gz") == {"wiki": ["x/wiki.jsonl.gz"]}
    assert parse_inputs(["a.txt", "b.JSONL", "src/"]) == {"a": ["a.txt"], "b": ["b.JSONL"], "src": ["src/"]}
    assert parse_inputs({"code": "x", "prose": ["y", "z"]}) == {"code": ["x"], "prose": ["y", "z"]}
    assert parse_inputs(tmp_path / "v1.5") == {"v1.5": [str(tmp_path / "v1.5")]}
    assert parse_inputs("builtin") == builtin_inputs()
    assert parse_inputs({"a": "builtin:code"}) == {"a": ["builtin:code"]}


def test_parse_inputs_takes_configuration_objects() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"input": {"a": "x", "b": ["y"]}, "more": ["p.txt"]})
    assert parse_inputs(config.input) == {"a": ["x"], "b": ["y"]}
    assert parse_inputs(config.more) == {"p": ["p.txt"]}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["x/a.txt", "y/a.md"], ["'x/a.txt' and 'y/a.md' would both be domain 'a': name them"]),
        (None, ["not null"]),
        ({}, ["no text given"]),
        ([], ["[]"]),
        ("", ['not ""']),
        ([1], ["[1]"]),
        ({"a": 1}, ["input.a"]),
        ({"a": []}, ["input.a"]),
        ({"a/b": "x"}, ["the domain's name 'a/b' must begin with a letter or digit"]),
        ({3: "x"}, ["3"]),
        ("x/$(y).txt", ["'$(y)'", "'x/$(y).txt'"]),
        ("..txt/.txt", ["'.txt'"]),
    ],
)
def test_bad_inputs_are_refused(fails, value: object, words: list[str]) -> None:
    fails(lambda: parse_inputs(value), *words)


# ---- training and validation text ----


def test_split_is_near_the_fraction_and_loses_nothing() -> None:
    texts = [story("x", n) for n in range(2000)]
    train, valid = split(texts, fraction=0.05)
    assert sorted(train + valid) == sorted(texts)
    assert 0.04 < sum(map(len, valid)) / sum(map(len, texts)) < 0.06


def test_split_depends_on_the_seed() -> None:
    texts = [story("x", n) for n in range(500)]
    assert split(texts) == split(texts)
    assert split(texts, seed=1)[1] != split(texts)[1]


def test_split_is_stable_when_documents_are_added() -> None:
    texts = [story("x", n) for n in range(500)]
    more = [story("y", n) for n in range(300)]
    mixed = more[:100] + texts[::-1] + more[100:]
    assert set(split(mixed)[1]) & set(texts) == set(split(texts)[1])


def words(texts: list[str]) -> set[str]:
    """Texts up to white space."""
    return {" ".join(text.split()) for text in texts}


def test_copies_of_a_document_stay_together() -> None:
    train, valid = split([story("x", n) for n in range(500)] * 3)
    assert valid and not set(train) & set(valid)


def layouts(n: int) -> dict[str, list[list[str]]]:
    """Domains with copies of n texts, by name."""
    texts = [story("x", i) for i in range(n)]
    others = [story("y", i) for i in range(3 * n)]
    long = "".join(story("long", i) for i in range(400))
    return {
        "twice": [texts * 2],
        "twice, with other white space": [texts + [f"\n {text.replace(' ', '  ')}\r\n\r\n" for text in texts]],
        "two domains": [texts, texts],
        "a part of a larger domain": [texts, texts + others],
        "a part of a larger domain, read first": [texts + others, texts],
        "three domains and others": [texts + others[:n], others, texts * 2 + others[n:]],
        "one document a domain": [[text] for text in texts[:3] * 2],
        "one document outweighs": [[long, *texts], [long], [*texts, long]],
    }


@pytest.mark.parametrize("name", layouts(3))
@pytest.mark.parametrize("n", [3, 10, 60])
def test_no_text_is_in_training_and_in_validation(name: str, n: int) -> None:
    """No text is in training and validation, neither a whole document nor a half of a cut one, for all domains and many seeds."""
    domains = layouts(n)[name]
    for seed in range(40 if n == 10 else 8):
        found = splits(*domains, seed=seed)
        train, valid = (words([text for domain in found for text in domain[i]]) for i in (0, 1))
        assert not train & valid
        for part in valid:  # no training text contains a validation text, as a whole copy of a cut document would
            assert not any(part in text for text in train)
        for texts, (kept, held) in zip(domains, found, strict=True):
            assert kept and held
            assert sorted("".join(kept + held)) == sorted("".join(texts))


@settings(max_examples=150, deadline=None)
@given(data=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=12), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_overlap_of_domains_is_split_without_copies(data: list[list[int]], seed: int) -> None:
    domains = [[f"{i} " + "z" * 5 * i + f" end {i}" for i in row] for row in data]
    found = splits(*domains, fraction=0.2, seed=seed)
    train, valid = ({text for domain in found for text in domain[i]} for i in (0, 1))
    assert not train & valid and all(kept and held for kept, held in found)


def test_white_space_does_not_move_the_cut_of_a_copy() -> None:
    text = " ".join(f"word{i}" for i in range(300))
    copy = text.replace(" ", "\r\n\t ") + "\n" * 999
    (train, valid), (other_train, other_valid) = splits([text], [copy])
    assert words(train) == words(other_train) and words(valid) == words(other_valid)


@pytest.mark.parametrize("texts", [["a" * n for n in (100, 90, 80)], ["a" * 10_000, "b", "c"], ["é" * 400], ["ab"]])
def test_few_documents_give_both_splits(texts: list[str]) -> None:
    train, valid = split(texts, fraction=0.1)
    assert all(train) and all(valid) and train and valid
    assert sorted("".join(train + valid)) == sorted("".join(texts))
    if len(texts) == 1:
        assert train + valid == [texts[0][: len(train[0])], texts[0][len(train[0]) :]]
        assert len(valid[0]) == max(1, round(0.1 * len(texts[0])))


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=30), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 9))
def test_both_splits_are_never_empty(sizes: list[int], fraction: float, seed: int) -> None:
    texts = [f"{i:x}" + "z" * size for i, size in enumerate(sizes)]
    train, valid = split(texts, fraction, seed)
    assert all(train) and all(valid) and train and valid
    total = sum(map(len, texts))
    assert sum(map(len, train)) + sum(map(len, valid)) == total
    if fraction * total > 2:
        assert 0.3 * fraction < sum(map(len, valid)) / total < 2.1 * fraction


@pytest.mark.parametrize("texts", [["a"], ["a", "b"]])
def test_too_small_a_domain_is_refused(fails, texts: list[str]) -> None:
    fails(lambda: split(texts), "domain 'd0'", "too small")


# ---- the tokenizer's sample ----


def test_tokenizer_sees_training_text_only() -> None:
    made = parts([story("x", n) for n in range(50)], ["one long document " * 100])
    wanted = [text for part in made for _, valid, text in part.texts() if not valid]
    assert list(module._sample(made)) == wanted


def test_sample_is_capped_and_even(monkeypatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_BYTES", 3000)
    made = parts([story("x", n) for n in range(1000)], [story("y", n) for n in range(200)], ["z" * 10_000])
    sample = list(module._sample(made))
    for letter in "xyz":
        assert 700 < sum(len(t) for t in sample if t.startswith(letter)) <= 1000
    numbers = [int(t.split()[1][:-1]) for t in sample if t.startswith("x") and ":" in t]
    assert max(numbers) > 500  # drawn from the whole domain


# ---- prepare ----


def test_tokens_decode_to_the_documents(corpus_dir: Path, prepared_dir: Path) -> None:
    table = json.loads((prepared_dir / "data.json").read_text())
    assert table["version"] == 1
    assert set(table["domains"]) == {"plain", "lines", "single"}
    for name, source in (("plain", "plain"), ("lines", "lines.jsonl"), ("single", "single.md")):
        train, valid = (documents(prepared_dir / f"{name}_{s}", prepared_dir / "tokenizer") for s in ("train", "valid"))
        texts = list(open_corpus(name, [corpus_dir / source]))
        if name == "single":
            assert train + valid == [texts[0][: len(train[0])], texts[0][len(train[0]) :]]
        else:
            assert sorted(train + valid) == sorted(texts) and train and valid
        entry = table["domains"][name]
        assert (entry["train"], entry["valid"], entry["documents"]) == (f"{name}_train", f"{name}_valid", len(texts))
        assert entry["bytes"] == sum(len(t.encode()) for t in texts)
        for s in ("train", "valid"):
            dataset = IndexedDataset(str(prepared_dir / f"{name}_{s}"))
            assert entry[f"{s}_tokens"] == dataset.sequence_lengths.sum()
            assert dataset.index.dtype == np.uint16
    assert {f.suffix for f in prepared_dir.iterdir() if f.is_file()} == {".bin", ".idx", ".json"}
    tok = open_tokenizer(prepared_dir / "tokenizer")
    assert (tok.vocab_size, tok.eod) == (table["vocab_size"], table["eod"])


def test_the_same_input_gives_the_same_bytes(corpus_dir: Path, prepared_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Files are equal byte by byte, also where the text is encoded in batches of another size."""
    monkeypatch.setattr(tokenizer_module, "BATCH", 500)
    inputs = {name.split(".")[0]: [str(corpus_dir / name)] for name in ("plain", "lines.jsonl", "single.md")}
    lines: list[str] = []
    figures = prepare_data(inputs, tmp_path, vocab_size=300, valid_fraction=0.1, seed=5, progress=lines.append)
    files = [f.relative_to(prepared_dir) for f in prepared_dir.rglob("*") if f.is_file()]
    assert len(files) == 16
    for file in files:
        assert (tmp_path / file).read_bytes() == (prepared_dir / file).read_bytes()
    assert lines[:2] == ["reading plain", "plain: 60 documents; read 60 file(s) (60 text)"]
    assert "prepare: tokenizing: 0.00 of 22.8k B\n" in capsys.readouterr().out
    domains = json.loads((tmp_path / "data.json").read_text())["domains"]
    for name, entry in figures["domains"].items():
        tokens = entry["train_tokens"] + entry["valid_tokens"]
        assert entry.pop("files") and not entry.pop("left_out") and not entry.pop("empty_texts")
        assert entry == {**domains[name], "bytes_per_token": entry["bytes"] / tokens}
    assert figures["skipped"] == []


def test_given_tokenizer_is_copied(corpus_dir: Path, tmp_path: Path) -> None:
    tok = train_tokenizer([story("other", n) for n in range(50)], 280)
    tok.save(tmp_path / "tok")
    (tmp_path / "out").mkdir()
    figures = prepare_data({"d": [corpus_dir / "plain"]}, tmp_path / "out", tokenizer=tmp_path / "tok", vocab_size=999)
    assert figures["vocab_size"] == tok.vocab_size
    for file in (tmp_path / "tok").iterdir():
        assert (tmp_path / "out" / "tokenizer" / file.name).read_text() == file.read_text()


def test_large_vocabulary_is_written_as_int32(corpus_dir: Path, tmp_path: Path, monkeypatch) -> None:
    tok = train_tokenizer(["a b c"], 257)
    monkeypatch.setattr(module, "open_tokenizer", lambda path, *keys: type(tok)(tok.hf, 70_000, tok.eod))
    prepare_data({"d": [corpus_dir / "plain"]}, tmp_path, tokenizer="x")
    dataset = IndexedDataset(str(tmp_path / "d_train"))
    assert dataset.index.dtype == np.int32
    assert dataset[0][-1] == tok.eod


def test_skip_bad_reports(corpus_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "in" / "rows.jsonl").write_text('{"text": "a row that is fine"}\n{"no": 1}\n{"text": "and another one"}\n')
    (tmp_path / "in" / "photo.png").write_bytes(b"x")
    figures = prepare_data({"d": [tmp_path / "in"]}, tmp_path / "out", vocab_size=257, skip_bad=True)
    places = {place: reason for place, reason in figures["skipped"]}
    assert list(places) == [str(tmp_path / "in" / "bad.txt"), f"{tmp_path / 'in' / 'rows.jsonl'}, line 2"]
    domain = figures["domains"]["d"]
    assert domain["left_out"] == {".png": 1} and domain["files"] == {"JSON lines": 1, "text": 1} and domain["empty_texts"] == 0
    json.dumps(figures)


def test_bad_input_fails_before_anything_is_written(corpus_dir: Path, tmp_path: Path, fails) -> None:
    bad = tmp_path / "z.txt"
    bad.write_bytes(b"\xff")
    (tmp_path / "out").mkdir()
    inputs = {"good": [corpus_dir / "plain"], "z": [bad]}
    fails(lambda: prepare_data(inputs, tmp_path / "out"), bad)
    message = fails(
        lambda: prepare_data(inputs, tmp_path / "out", skip_bad=True), "domain 'z'", "no document", "1 unreadable skipped"
    )
    assert message
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("fraction", [0, -0.1, 0.6, float("nan")])
def test_a_bad_fraction_is_refused(corpus_dir: Path, tmp_path: Path, fails, fraction: float) -> None:
    fails(lambda: prepare_data({"d": [corpus_dir]}, tmp_path, valid_fraction=fraction), "valid_fraction")


def test_a_bad_out_is_refused(corpus_dir: Path, tmp_path: Path, fails) -> None:
    fails(lambda: prepare_data({"d": [corpus_dir]}, tmp_path / "missing"), tmp_path / "missing")
    (tmp_path / "x").touch()
    fails(lambda: prepare_data({"d": [corpus_dir]}, tmp_path), tmp_path, "not an empty directory")


def test_end_of_text_in_a_document_does_not_end_it(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text(f"first {END_OF_TEXT} second. " * 20)
    (tmp_path / "out").mkdir()
    prepare_data({"d": [tmp_path / "in.txt"]}, tmp_path / "out", vocab_size=257)
    (train,) = documents(tmp_path / "out" / "d_train", tmp_path / "out" / "tokenizer")
    assert train.startswith(f"first {END_OF_TEXT} second.")


def test_input_that_changes_meanwhile_is_noticed() -> None:
    corpus = InMemory(["some text", "more text", "and more"])
    documents = Documents.of("d", corpus, 0)
    part = Part("d", corpus, documents, split_documents([documents], 0.3)[0])
    corpus.texts.append("late")
    with pytest.raises((ValueError, FlextronError)):
        list(part.texts())
