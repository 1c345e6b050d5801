"""Existing Megatron corpora as data: Megatron-Core's own samples, weights and splits, and what is refused."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list

from flextron_mcore.data.blend import PreparedData, _TokenizerFacts, open_data, train_dataset, valid_datasets
from flextron_mcore.data.epochs import epochs, reading, repeated
from flextron_mcore.data.existing import bounds, describe, parse_paths, split_text

pytestmark = pytest.mark.usefixtures("one_process")


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> None:
    """Corpus as Megatron-LM's preprocess_data.py writes it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def stories(seed: int, count: int, eod: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [[*draw.integers(1, 290, draw.integers(5, 60)).tolist(), eod] for _ in range(count)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, prepared_dir: Path) -> Path:
    """Directory with the corpora web (80 documents) and code (45, int32) of the tokenizer of `prepared_dir`."""
    root = tmp_path_factory.mktemp("corpora")
    eod = open_data(prepared_dir).eod
    write(root / "web", stories(1, 80, eod))
    write(root / "code", stories(2, 45, eod), np.int32)
    return root


@pytest.fixture
def described(corpora: Path, prepared_dir: Path, tmp_path: Path):
    """described(paths, split): PreparedData of existing corpora; {DIR} in a path stands for the directory of `corpora`."""
    lines: list[str] = []

    def make(paths: object, split: object = "90,8,2", name: str = "data", tokenizer: Path | None = None) -> PreparedData:
        out = tmp_path / name
        out.mkdir()
        filled = json.loads(json.dumps(paths).replace("{DIR}", str(corpora)))
        describe(parse_paths(filled), split, tokenizer or prepared_dir / "tokenizer", out, lines.append)
        return open_data(out)

    make.lines = lines
    return make


def of_megatron(blend: list, split: str, sizes: list, data: PreparedData, **more) -> list:
    """Datasets of all splits as Megatron-LM's pretrain_gpt.py builds them."""
    config = GPTDatasetConfig(
        random_seed=3,
        sequence_length=16,
        blend=get_blend_from_list(blend),
        split=split,
        tokenizer=_TokenizerFacts(data.vocab_size, data.eod, data.fingerprint),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        drop_last_partial_validation_sequence=False,
        **more,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def same(ours, theirs, count: int) -> bool:
    return all(torch.equal(ours[i]["tokens"], theirs[i]["tokens"]) for i in range(count))


@pytest.mark.parametrize("split", ["90,8,2", [9, 1], "97,3,0", "1,1,1"])
def test_samples_are_those_of_megatron(described, corpora: Path, tmp_path: Path, split) -> None:
    """Weights and split have Megatron-Core's meaning: its own builder gives the same samples, sample by sample."""
    blend = ["0.7", "{DIR}/web", "0.3", "{DIR}/code"]
    data = described(blend, split)
    ours = train_dataset(data, 16, 200, seed=3, cache_dir=tmp_path / "cache")
    surplus = ours.config.mid_level_dataset_surplus
    filled = [item.replace("{DIR}", str(corpora)) for item in blend]
    theirs = of_megatron(filled, split_text(split), [200, 10, 0], data, mid_level_dataset_surplus=surplus)
    assert same(ours, theirs[0], 200)
    for name in ("web", "code"):
        found = valid_datasets(data, 16, seed=3, cache_dir=tmp_path / "cache")[name]
        wanted = of_megatron([str(corpora / name)], split_text(split), [None, None, None], data)[1]
        assert len(found) == len(wanted)
        assert same(found, wanted, len(wanted))


def test_tokens_of_each_part_are_counted(described, corpora: Path) -> None:
    data = described(["{DIR}/web", "{DIR}/code"], "90,8,2")
    for name, domain in data.domains.items():
        dataset = IndexedDataset(str(corpora / name))  # kept alive: its end unmaps the lengths
        lengths = dataset.sequence_lengths
        (begin, end), (start, stop) = bounds("90,8,2").values()
        assert domain.train_tokens == lengths[round(begin * len(lengths)) : round(end * len(lengths))].sum()
        assert domain.valid_tokens == lengths[round(start * len(lengths)) : round(stop * len(lengths))].sum()
        assert 0 < domain.valid_tokens < domain.train_tokens < lengths.sum()
        assert domain.weight == domain.train_tokens  # without weights: by size


def test_files_of_prepare_named_by_paths_are_the_same_data(
    described, prepared_dir: Path, prepared: PreparedData, tmp_path
) -> None:
    """paths={train: ..., validation: ...} of the files of a prepared directory gives its samples, in its order."""
    files = {part: [f"{prepared_dir}/{name}_{part}" for name in ("plain", "lines")] for part in ("train", "valid")}
    data = described({"train": files["train"], "validation": files["valid"]})
    assert list(data.domains) == ["plain_train", "lines_train", "plain_valid", "lines_valid"]
    ours = train_dataset(data, 16, 100, 3, tmp_path / "cache", {"plain_train": 1, "lines_train": 2})
    assert same(ours, train_dataset(prepared, 16, 100, 3, tmp_path / "cache", {"plain": 1, "lines": 2}), 100)
    found, wanted = valid_datasets(data, 16, 3, tmp_path / "cache"), valid_datasets(prepared, 16, 3, tmp_path / "cache")
    assert list(found) == ["plain_valid", "lines_valid"]
    assert same(found["plain_valid"], wanted["plain"], len(wanted["plain"]))


def test_corpora_may_move(described, corpora: Path, prepared_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(corpora, tmp_path / "moved")
    before = described([2, "{DIR}/web", 1, "{DIR}/code"])
    moved = described([2, f"{tmp_path}/moved/web", 1, f"{tmp_path}/moved/code"], name="again")
    assert moved.fingerprint == before.fingerprint
    assert described([1, "{DIR}/web", 1, "{DIR}/code"], name="other").fingerprint != before.fingerprint
    assert described([2, "{DIR}/web", 1, "{DIR}/code"], "95,5,0", name="split").fingerprint != before.fingerprint


def test_changed_corpora_are_refused(described, corpora: Path, tmp_path: Path, fails) -> None:
    shutil.copytree(corpora, tmp_path / "mine")
    data = described([f"{tmp_path}/mine/web"])
    file = tmp_path / "mine" / "web.bin"
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    fails(lambda: open_data(data.path), file, "changed since", "prepare")


def test_names_of_domains_differ(described, corpora: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        shutil.copytree(corpora, tmp_path / folder)
    assert list(described([f"{tmp_path}/a/web", f"{tmp_path}/b/web"]).domains) == ["a/web", "b/web"]


def test_the_user_sees_text(described, prepared_dir: Path) -> None:
    described([f"{prepared_dir}/plain_train"])
    assert "begins with 'plain " in described.lines[0]
    assert "100% of its first documents" in described.lines[0]


def test_documents_without_end_are_warned_of(described, tmp_path: Path) -> None:
    write(tmp_path / "open", [[5, 6, 7]] * 50)
    described([str(tmp_path / "open")])
    assert described.lines[0].startswith("warning: ")


def test_epochs_are_those_of_the_indices(prepared: PreparedData, tmp_path: Path) -> None:
    """Each domain is read as often as Megatron-Core's indices have its samples and its documents."""
    weights, samples = {"plain": 3.0, "single": 1.0}, 400
    dataset = train_dataset(prepared, 16, samples, 3, tmp_path, weights)
    found = epochs(prepared, weights, samples * 16)
    assert list(found) == sorted(found, key=lambda name: -found[name])
    taken = Counter(dataset.dataset_index[:samples].tolist())
    for number, name in enumerate(weights):
        read = taken[number] * 16 / prepared.domains[name].train_tokens
        assert found[name] == pytest.approx(read, abs=32 / prepared.domains[name].train_tokens)
        part = dataset.datasets[number]
        passes = len(part.document_index) / len(part.indices)  # whole passes over the documents, with a surplus of samples
        assert math.ceil(found[name]) <= passes <= math.ceil(found[name] * 1.2) + 1
    text = reading(prepared, weights, samples * 16)
    assert text.startswith("reads 6,400 tokens from ") and f"plain {found['plain']:.2g} times" in text
    assert repeated(prepared, None, 100) is None
    most, times = "lines", 4.5
    assert f"'{most}' is read {times:.2g} times" in (
        repeated(prepared, {most: 1.0}, round(times * prepared.domains[most].train_tokens)) or ""
    )


REFUSED = {
    "nothing": ([], "99,1", "paths: must be"),
    "a number": (5, "99,1", "paths: must be"),
    "too few weights": ([0.7, "{DIR}/web", "{DIR}/code"], "99,1", "as many weights as prefixes"),
    "two weights": ([0.7, 0.3], "99,1", "as many weights as prefixes"),
    "negative weight": ([-1, "{DIR}/web", 1, "{DIR}/code"], "99,1", "paths: must be"),
    "no weight": ([0, "{DIR}/web", 0, "{DIR}/code"], "99,1", "no weight above 0"),
    "infinite weight": (["inf", "{DIR}/web"], "99,1", "cannot be read"),
    "twice": (["{DIR}/web", "{DIR}/web"], "99,1", "twice"),
    "with suffix": (["{DIR}/web.bin"], "99,1", "without .bin"),
    "missing": (["{DIR}/nope"], "99,1", "nope.idx: cannot be read"),
    "half a mapping": ({"train": ["{DIR}/web"]}, "99,1", "validation"),
    "weighted validation": ({"train": ["{DIR}/web"], "validation": [1, "{DIR}/code"]}, "99,1", "validated on its own"),
    "no split": (["{DIR}/web"], "0,0,0", "split=0,0,0"),
    "long split": (["{DIR}/web"], [1, 1, 1, 1], "split=[1,1,1,1]"),
    "words": (["{DIR}/web"], "most,rest", "split=most,rest"),
    "no validation": (["{DIR}/web"], "100,0,0", "no document for validation"),
}


@pytest.mark.parametrize(("paths", "split", "reason"), REFUSED.values(), ids=REFUSED)
def test_wrong_paths_are_refused(described, fails, paths, split, reason: str) -> None:
    fails(lambda: described(paths, split), reason)


def test_other_tokens_are_refused(described, tmp_path: Path, fails) -> None:
    write(tmp_path / "large", [[1, 2, 299], [7, 300, 299]])
    fails(lambda: described([str(tmp_path / "large")]), "large.bin", "token id 300", "ids 0 to 299", "tokenizer=")
    write(tmp_path / "below", [[1, 2, -1]], np.int32)
    fails(lambda: described([str(tmp_path / "below")], name="second"), "token id -1")


class Executed:
    """Object whose unpickling writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (self.file.write_text, ("executed",))


def damage(index: Path, change) -> None:
    data = bytearray(index.read_bytes())
    change(data)
    index.write_bytes(data)


def test_damaged_indices_are_refused(described, corpora: Path, tmp_path: Path, fails) -> None:
    """A length or an offset out of the file never reaches Megatron-Core, which reads there; a pickle is not opened."""
    mine = tmp_path / "mine"
    idx = mine / "web.idx"
    count = 80

    def put(place: int, kind: str, value: int):
        def change(data: bytearray) -> None:
            data[place : place + np.dtype(kind).itemsize] = np.array([value], kind).tobytes()

        return change

    spoilt = {
        "length": put(34 + 4, "<i4", 10**6),
        "negative length": put(34 + 4, "<i4", -5),
        "offset": put(34 + 4 * count + 8, "<i8", 2**40),
        "document": put(34 + 12 * count + 8, "<i8", 10**6),
        "float tokens": put(17, "u1", 7),
        "count": put(18, "<u8", 2**40),
        "pickle": lambda data: data.__setitem__(slice(None), pickle.dumps(Executed(tmp_path / "executed"))),
    }
    for number, change in enumerate(spoilt.values()):
        shutil.rmtree(mine, ignore_errors=True)
        shutil.copytree(corpora, mine)
        damage(idx, change)
        fails(lambda number=number: described([str(mine / "web")], name=str(number)), idx, "preprocess_data.py")
    assert not (tmp_path / "executed").exists()
    shutil.rmtree(mine)
    shutil.copytree(corpora, mine)
    damage(mine / "web.bin", lambda data: data.__delitem__(slice(-2, None)))
    fails(lambda: described([str(mine / "web")], name="short"), mine / "web.bin", "truncated")
