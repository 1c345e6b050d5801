"""Prepared data opened, blended by weights, and read as training and validation samples."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import SAMPLE_KEYS, PreparedData, batch, check_tokenizer, open_data, train_dataset, valid_datasets
from flextron_mcore.data.prepare import prepare_data
from flextron_mcore.data.tokenizer import open_tokenizer

pytestmark = pytest.mark.usefixtures("one_process")


def token_file(prefix: str) -> np.ndarray:
    """All tokens of a token file, as a copy that outlives its IndexedDataset."""
    dataset = IndexedDataset(prefix)
    return np.concatenate(list(dataset))


def sources(dataset, data: PreparedData) -> Counter:
    """{domain: samples of it in a dataset}, found by the text of the samples."""
    tok = open_tokenizer(data.tokenizer)
    count: Counter = Counter()
    for i in range(len(dataset)):
        text = tok.decode(dataset[i]["tokens"])
        (name,) = (name for name in data.domains if f"{name} " in text)
        count[name] += 1
    return count


# ---- opening ----


def test_prepared_data_opens_with_its_figures(prepared_dir: Path, prepared: PreparedData) -> None:
    assert list(prepared.domains) == ["plain", "lines", "single"]
    assert prepared.tokenizer == prepared_dir / "tokenizer"
    assert prepared.domains["plain"].train == str(prepared_dir / "plain_train")
    assert open_data(str(prepared_dir)) == prepared


def edit(path: Path, **changes: object) -> None:
    table = json.loads((path / "data.json").read_text())
    table.update(changes)
    (path / "data.json").write_text(json.dumps(table))


def cut(file: Path, left_out: int) -> None:
    file.write_bytes(file.read_bytes()[:-left_out])


SPOILT = {
    "no data.json": ("data.json", lambda p: (p / "data.json").unlink(), "cannot be read"),
    "broken data.json": ("data.json", lambda p: cut(p / "data.json", 9), "not valid JSON"),
    "other version": ("data.json", lambda p: edit(p, version=2), "version 1"),
    "not an object": ("data.json", lambda p: (p / "data.json").write_text("[]"), "version 1"),
    "no domain": ("data.json", lambda p: edit(p, domains={}), "lists no domain"),
    "lacking entry": ("data.json", lambda p: edit(p, domains={"a": {"train": "plain_train"}}), "an entry is missing or invalid"),
    "domains of wrong type": ("data.json", lambda p: edit(p, domains=[1]), "an entry is missing or invalid"),
    "no bin": ("lines_train.bin", lambda p: (p / "lines_train.bin").unlink(), "cannot be read"),
    "no idx": ("lines_valid.idx", lambda p: (p / "lines_valid.idx").unlink(), "cannot be read"),
    "truncated bin": ("single_valid.bin", lambda p: cut(p / "single_valid.bin", 2), "truncated"),
    "truncated idx": ("single_train.idx", lambda p: cut(p / "single_train.idx", 1), "truncated"),
    "empty idx": ("plain_train.idx", lambda p: (p / "plain_train.idx").write_bytes(b""), "truncated"),
    "no tokenizer": ("tokenizer", lambda p: shutil.rmtree(p / "tokenizer"), "no such directory"),
    "other bin": ("plain_valid.bin", lambda p: shutil.copy(p / "plain_train.bin", p / "plain_valid.bin"), "other data"),
}


@pytest.mark.parametrize(("file", "spoil", "reason"), SPOILT.values(), ids=SPOILT)
def test_spoilt_data_is_refused_by_file(prepared_dir: Path, tmp_path: Path, fails, file: str, spoil, reason: str) -> None:
    root = tmp_path / "data"
    shutil.copytree(prepared_dir, root)
    spoil(root)
    fails(lambda: open_data(root), root / file, reason)


def test_a_missing_directory_is_refused(tmp_path: Path, fails) -> None:
    fails(lambda: open_data(tmp_path / "nope"), tmp_path / "nope", "prepare")


def test_fingerprint_is_that_of_the_tokens(prepared_dir: Path, prepared: PreparedData, tmp_path: Path, monkeypatch) -> None:
    """The fingerprint does not change when the directory is moved. One other token, at equal document lengths, changes it."""
    copy = tmp_path / "elsewhere"
    shutil.copytree(prepared_dir, copy)
    assert open_data(copy).fingerprint == prepared.fingerprint
    file = copy / "lines_valid.bin"
    tokens = bytearray(file.read_bytes())
    tokens[-2] ^= 1
    file.write_bytes(tokens)
    assert open_data(copy).fingerprint != prepared.fingerprint
    # of a large file only parts are hashed, the first and the last included
    monkeypatch.setattr("flextron_mcore.data.index._SEEN", 8)
    monkeypatch.setattr("flextron_mcore.data.index._PARTS", 2)
    seen = {open_data(copy).fingerprint}
    for place in (0, 8, len(tokens) // 2, -1):
        changed = tokens.copy()
        changed[place] ^= 1
        file.write_bytes(changed)
        seen.add(open_data(copy).fingerprint)
    assert len(seen) == 4  # byte 8, behind the first part, is not hashed


def test_the_tokenizer_must_be_the_models(prepared: PreparedData, tmp_path: Path, fails) -> None:
    check_tokenizer(prepared, None)
    check_tokenizer(prepared, prepared.tokenizer)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    check_tokenizer(prepared, tmp_path)  # a directory with sentencepiece only cannot be compared
    model = tmp_path / "model"
    shutil.copytree(prepared.tokenizer, model)
    file = model / "tokenizer.json"
    table = json.loads(file.read_text())
    vocab = table["model"]["vocab"]
    first, second = list(vocab)[270:272]
    vocab[first], vocab[second] = 271, 270
    file.write_text(json.dumps(table))
    fails(lambda: check_tokenizer(prepared, model), f"data={prepared.path}", model, "another tokenizer", f"270 {first!r}")


# ---- training ----


def test_samples_have_shifted_labels_and_full_masks(prepared: PreparedData, tmp_path: Path) -> None:
    dataset = train_dataset(prepared, 32, 20, seed=3, cache_dir=tmp_path)
    assert len(dataset) >= 20
    for i in range(len(dataset)):
        sample = dataset[i]
        for key in SAMPLE_KEYS:
            assert sample[key].shape == (32,)
            assert sample[key].dtype == (torch.float32 if key == "loss_mask" else torch.int64)
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert torch.equal(sample["position_ids"], torch.arange(32))
        assert (sample["loss_mask"] == 1).all()
        assert sample["tokens"].min() >= 0 and sample["tokens"].max() < prepared.vocab_size


def test_samples_are_the_text(prepared: PreparedData, tmp_path: Path) -> None:
    """Samples of one training epoch, in order, are the text of the token file."""
    name = "plain"
    tokens = token_file(prepared.domains[name].train)
    tok = open_tokenizer(prepared.tokenizer)
    dataset = train_dataset(prepared, 16, (len(tokens) - 1) // 16, seed=3, cache_dir=tmp_path, weights={name: 1})
    texts = set(tok.decode(tokens).split("<|endoftext|>"))
    order = np.argsort(dataset.shuffle_index)
    joined = tok.decode(torch.cat([dataset[int(i)]["tokens"] for i in order]))
    pieces = joined.split("<|endoftext|>")
    assert len(pieces) > 40 and set(pieces[:-1]) <= texts and len(set(pieces)) == len(pieces)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        (None, {"plain": 1 / 3, "lines": 1 / 3, "single": 1 / 3}),
        ({"plain": 6, "lines": 3, "single": 1}, {"plain": 0.6, "lines": 0.3, "single": 0.1}),
        ({"lines": 0.2, "plain": 0.8}, {"plain": 0.8, "lines": 0.2}),
        ({"lines": 1, "plain": 0}, {"lines": 1.0}),
    ],
)
def test_domains_get_their_weights(
    prepared: PreparedData, tmp_path: Path, weights: dict | None, shares: dict[str, float]
) -> None:
    dataset = train_dataset(prepared, 48, 200, seed=1, cache_dir=tmp_path, weights=weights)
    count = sources(dataset, prepared)
    assert set(count) == set(shares)
    for name, share in shares.items():
        assert count[name] / len(dataset) == pytest.approx(share, abs=0.01)


def test_any_weights_and_sizes_can_be_built(prepared: PreparedData, tmp_path: Path) -> None:
    """Megatron-Core alone fails for some of these blends of four and more domains: it asks for more samples than it made."""
    domains = {f"{name}{i}": domain for name, domain in prepared.domains.items() for i in range(2)}
    data = dataclasses.replace(prepared, domains=domains)
    rng = np.random.default_rng(0)
    for seed in range(40):
        weights = dict(zip(domains, rng.dirichlet([0.3] * len(domains)) + 1e-4, strict=True))
        size = int(rng.integers(1, 60))
        dataset = train_dataset(data, int(rng.choice([8, 5000, 20_000])), size, seed, tmp_path, weights)
        assert len(dataset) >= size
        dataset[len(dataset) - 1]


def test_training_data_is_a_function_of_the_seed(prepared: PreparedData, tmp_path: Path) -> None:
    def tokens(seed: int, cache: str) -> torch.Tensor:
        return batch(train_dataset(prepared, 32, 40, seed, tmp_path / cache), range(40))["tokens"]

    first = tokens(1, "a")
    assert torch.equal(first, tokens(1, "a"))  # built from the cached indices
    assert torch.equal(first, tokens(1, "b"))
    assert not torch.equal(first, tokens(2, "a"))


def test_a_broken_index_is_built_again(prepared: PreparedData, tmp_path: Path) -> None:
    """Megatron-Core alone would fail with `mmap length is greater than file size` until the cache is removed."""
    first = train_dataset(prepared, 16, 40, 1, tmp_path / "cache")
    expected = [first[i]["tokens"].tolist() for i in range(len(first))]
    files = sorted((tmp_path / "cache").rglob("*.npy"))
    assert files
    for broken in files:
        broken.write_bytes(broken.read_bytes()[:-4])
        again = train_dataset(prepared, 16, 40, 1, tmp_path / "cache")
        assert [again[i]["tokens"].tolist() for i in range(len(again))] == expected
    files[0].write_bytes(b"")
    again = train_dataset(prepared, 16, 40, 1, tmp_path / "cache")
    assert [again[i]["tokens"].tolist() for i in range(len(again))] == expected


def test_an_index_that_cannot_be_written_leaves_nothing(prepared: PreparedData, tmp_path: Path, monkeypatch) -> None:
    save, calls = np.save, []

    def full(file, *args, **options):
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(file, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(FlextronError, match="cannot be written: No space left on device"):
            train_dataset(prepared, 16, 40, 1, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*"))
    assert len(train_dataset(prepared, 16, 40, 1, tmp_path / "cache")) >= 40


def test_data_prepared_anew_is_not_read_with_old_indices(corpus_dir: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "data", tmp_path / "cache"
    for files in (["plain"], ["lines.jsonl", "plain"]):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        prepare_data({"d": [corpus_dir / f for f in files]}, out, vocab_size=260)
        dataset = valid_datasets(open_data(out), 16, 1, cache)["d"]
        found = sum(dataset[i]["loss_mask"].sum() for i in range(len(dataset)))
        assert found == open_data(out).domains["d"].valid_tokens - 1


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"plane": 1}, ["'plane'", "did you mean 'plain'?"]),
        ({"plain": -1}, ["data_weights.plain", "-1"]),
        ({"plain": float("nan")}, ["data_weights.plain"]),
        ({"plain": "1"}, ["data_weights.plain"]),
        ({"plain": True}, ["data_weights.plain"]),
        ({"plain": 0}, ["no domain"]),
        ({}, ["no domain"]),
    ],
)
def test_bad_weights_are_refused(prepared: PreparedData, tmp_path: Path, fails, weights: dict, words: list[str]) -> None:
    fails(lambda: train_dataset(prepared, 32, 10, 0, tmp_path, weights), *words)


# ---- validation ----


@pytest.mark.parametrize("seq_length", [7, 32, 5000])
def test_validation_is_one_epoch(prepared: PreparedData, tmp_path: Path, seq_length: int) -> None:
    """Every token but the first is a label once, also with a sequence length (5000) beyond the whole split."""
    for name, dataset in valid_datasets(prepared, seq_length, 1, tmp_path).items():
        tokens = token_file(prepared.domains[name].valid)
        assert len(dataset) == -(-(len(tokens) - 1) // seq_length)
        samples = [dataset[i] for i in range(len(dataset))]
        labels = torch.cat([s["labels"][s["loss_mask"] == 1] for s in samples])
        assert len(labels) == len(tokens) - 1
        first = Counter(tokens.tolist()) - Counter(labels.tolist())
        assert first.total() == 1
        assert all((s["tokens"] >= 0).all() and (s["labels"] >= 0).all() for s in samples)


def test_partial_sample_does_not_spoil_the_others(prepared: PreparedData, tmp_path: Path) -> None:
    """Megatron-Core reuses the loss mask of the first sample for all: read first, the padded last sample must not mask others."""
    dataset = valid_datasets(prepared, 32, 1, tmp_path)["plain"]
    partial = int(np.argmax(dataset.shuffle_index))
    assert 0 < dataset[partial]["loss_mask"].sum() < 32
    for i in range(len(dataset)):
        assert (dataset[i]["loss_mask"] == 1).all() == (i != partial)


def test_validation_is_deterministic(prepared: PreparedData, tmp_path: Path) -> None:
    one, two = (valid_datasets(prepared, 16, 1, tmp_path / name)["lines"] for name in "ab")
    every = range(len(one))
    for key, tensor in batch(one, every).items():
        assert torch.equal(tensor, batch(two, every)[key])


# ---- batches ----


def test_batch_counts_on_from_the_beginning(prepared: PreparedData, tmp_path: Path) -> None:
    dataset = valid_datasets(prepared, 16, 1, tmp_path)["plain"]
    n = len(dataset)
    wrapped = batch(dataset, range(n - 1, n + 2))
    assert set(wrapped) == set(SAMPLE_KEYS)
    for key, tensor in wrapped.items():
        assert tensor.shape == (3, 16)
        assert torch.equal(tensor, torch.stack([dataset[i][key] for i in (n - 1, 0, 1)]))


def test_batches_of_a_blend_hold_samples_only(prepared: PreparedData, tmp_path: Path) -> None:
    dataset = train_dataset(prepared, 16, 20, 0, tmp_path)
    assert set(batch(dataset, range(4))) == set(SAMPLE_KEYS)


def test_megatron_is_quiet_and_its_logger_is_left_as_it_was(prepared: PreparedData, tmp_path: Path, caplog) -> None:
    logger = logging.getLogger("megatron.core.datasets")
    with caplog.at_level(logging.INFO):
        before = logger.level
        train_dataset(prepared, 16, 20, 0, tmp_path)
        assert logger.level == before
    assert not [r for r in caplog.records if r.name.startswith("megatron.core.datasets")]
