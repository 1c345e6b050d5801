"""Fixtures of the data tests: a small corpus of three domains, prepared once."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch

from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData, open_data
from flextron_mcore.data.prepare import prepare_data

WORDS = ("model", "layer", "head", "width", "depth", "router", "token", "loss")


def story(domain: str, number: int) -> str:
    """Document of varying length that names its domain and its number."""
    words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(12 + number % 17)]
    return f"{domain} {number}: " + " ".join(words) + f"\n\tend of {domain} {number}.\n"


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with three domains of 60 documents: `plain` (.txt files), `lines` (a .jsonl), `single` (one text file)."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "plain").mkdir()
    for n in range(60):
        (root / "plain" / f"{n:02d}.txt").write_text(story("plain", n))
    (root / "lines.jsonl").write_text("".join(json.dumps({"text": story("lines", n)}) + "\n" for n in range(60)))
    (root / "single.md").write_text("".join(story("single", n) for n in range(40)) + string.printable)
    return root


@pytest.fixture(scope="session")
def prepared_dir(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of `corpus_dir`, prepared with a BPE of 300 tokens."""
    out = tmp_path_factory.mktemp("prepared")
    inputs = {name.split(".")[0]: [str(corpus_dir / name)] for name in ("plain", "lines.jsonl", "single.md")}
    prepare_data(inputs, out, vocab_size=300, valid_fraction=0.1, seed=5)
    return out


@pytest.fixture(scope="session")
def prepared(prepared_dir: Path) -> PreparedData:
    """PreparedData of `prepared_dir`."""
    return open_data(prepared_dir)


@pytest.fixture
def one_process():
    """An initialised torch.distributed of one process."""
    mine = not torch.distributed.is_initialized()
    if mine:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    if mine:
        torch.distributed.destroy_process_group()


@pytest.fixture
def fails():
    """fails(call, *words): assert that `call` raises FlextronError with one line that contains the words."""

    def check(call, *words: object) -> str:
        with pytest.raises(FlextronError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert str(word) in message
        return message

    return check
