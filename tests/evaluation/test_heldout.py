"""Tasks made from held-out text: their rows come from the validation documents, and only from there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import open_data
from flextron_mcore.data.documents import valid_documents
from flextron_mcore.data.tokenizer import open_tokenizer
from flextron_mcore.evaluation import heldout
from flextron_mcore.evaluation.heldout import KINDS, make
from tests.stages.conftest import stage

NAMES = "alder birch cedar ebony fir hazel larch maple oak pine rowan spruce walnut willow yew".split()


def document(i: int) -> str:
    """Text of 40 different words: letters only, the number of the document spelled in each."""
    digits = "".join("abcdefghij"[int(digit)] for digit in f"{i:02}")
    return " ".join(f"{NAMES[(i * 7 + k * k) % 15]}{digits}{'abcdefghij'[k % 10]}{'abcdefghij'[k // 10]}" for k in range(40))


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(heldout, "MOST_ROWS", 150)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heldout")
    texts = [document(i) for i in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stage("prepare", f"input={folder}/texts.jsonl", "vocab_size=400", "valid_fraction=0.3", f"out={folder}/data")
    return open_data(folder / "data")


@pytest.fixture(scope="module")
def tokenizer(data):
    return open_tokenizer(data.tokenizer)


@pytest.fixture(scope="module")
def held(data, tokenizer) -> list[str]:
    """Texts of the validation documents."""
    (found,) = valid_documents(data).values()
    pairs = zip(found.starts, found.starts[1:], strict=False)
    return [tokenizer.decode(found.tokens[a : b - 1]) for a, b in pairs]


def test_documents_are_those_of_validation(data, held):
    assert 5 < len(held) < 30 and set(held) <= {document(i) for i in range(60)}
    assert data.domains["texts"].valid_tokens == valid_documents(data)["texts"].starts[-1]


def test_rows(data, tokenizer, held):
    tasks = {task.name: task.rows for task in make(list(KINDS), data, tokenizer, 96, 1)}
    assert min(map(len, tasks.values())) > 100
    for row in tasks["heldout_last_word"]:
        assert any(row["context"] + row["target"] in text for text in held)
        assert len(row["context"].split()) == 15 and row["target"][1:].isalpha()
    for row in tasks["heldout_continuation"]:
        true = row["choices"][row["label"]]
        (own,) = [text for text in held if row["context"] + true in text]
        others = [choice for choice in row["choices"] if choice != true]
        assert len(others) == 3 and all(any(choice.strip() in text for text in held) for choice in others)
        assert not any(choice.strip() in own for choice in others)
        assert {len(choice.split()) for choice in row["choices"]} == {4} and len(row["context"].split()) == 12
    assert {row["label"] for row in tasks["heldout_continuation"]} == {0, 1, 2, 3}
    for row in tasks["heldout_minimal_pairs"]:
        good, bad = row["choices"][row["label"]].split(), row["choices"][1 - row["label"]].split()
        assert any(" ".join(good) in text for text in held) and good != bad and sorted(good) == sorted(bad)
        assert np.count_nonzero(np.array(good) != np.array(bad)) == 2
        assert (good[0], good[-1]) == (bad[0], bad[-1])
    assert {row["label"] for row in tasks["heldout_minimal_pairs"]} == {0, 1}


def test_rows_depend_on_the_seed_alone(data, tokenizer):
    one, again, other = (make(["heldout_last_word"], data, tokenizer, 96, seed)[0].rows for seed in (1, 1, 2))
    assert one == again and one[:50] != other[:50]
    # The rows of a task do not depend on the other tasks of a run.
    assert make(list(KINDS)[::-1], data, tokenizer, 96, 1)[-1].rows == one


def test_rows_fit_the_model(data, tokenizer):
    for task in make(list(KINDS), data, tokenizer, 40, 1):
        for row in task.rows:
            for end in row.get("choices", [row.get("target")]):
                assert len(tokenizer.encode_prompts([row["context"] + end])[0]) < 40


def test_files(data, tokenizer, tmp_path):
    for task in make(list(KINDS), data, tokenizer, 96, 1):
        task.write(tmp_path, tmp_path / "later")
        config = yaml.safe_load((tmp_path / f"{task.name}.yaml").read_text())
        assert config["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "later" / f"{task.name}.jsonl")
        assert [json.loads(line) for line in (tmp_path / f"{task.name}.jsonl").read_text().splitlines()] == task.rows


def test_text_that_yields_no_rows(tmp_path):
    (tmp_path / "numbers.txt").write_text("\n".join(f"{i} {i * i}" for i in range(2000)))
    stage("prepare", f"input={tmp_path}/numbers.txt", "vocab_size=300", "valid_fraction=0.3", f"out={tmp_path}/data")
    data = open_data(tmp_path / "data")
    for name, needs in (
        ("heldout_last_word", "needs passages that end in a word of letters"),
        ("heldout_continuation", "needs at least two documents with passages of some words"),
        ("heldout_minimal_pairs", "needs lines of several words of letters, which the 1 held-out document"),
    ):
        with pytest.raises(FlextronError, match=f"tasks: {name} {needs}"):
            make([name], data, open_tokenizer(data.tokenizer), 64, 1)
