"""Small files that describe large ones: refused, or read within the time and memory of the fixture `limits`."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.files import parse_json, parse_yaml
from flextron_mcore.settings.compose import read
from flextron_mcore.space import SubNetwork
from tests.hostile.conftest import refusal

LARGE = 10 * 10**9  # bytes


def zeros(piece: bytes, size: int) -> bytes:
    """Gzip file that unpacks to `size` bytes, a repeated piece: many members of the same content."""
    member = gzip.compress(piece * (2**24 // len(piece)))
    return member * (size // 2**24)


@pytest.mark.parametrize(
    "name, piece",
    [("a.jsonl.gz", b" "), ("b.jsonl.gz", b"\n"), ("c.jsonl.gz", b'{"text": "abcdefg"}\n'), ("d.jsonl.gz", b'{"a":')],
)
def test_compressed_text(copy, name, piece):
    file = copy.root / name
    file.write_bytes(zeros(piece, LARGE))
    assert file.stat().st_size < LARGE / 100
    message = refusal("prepare", f"input={file}", f"out={copy.root}/out")
    assert name in message and not (copy.root / "out").exists()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_file_of_holes(copy, name):
    (copy.root / name).touch()
    os.truncate(copy.root / name, LARGE)
    assert name in refusal("prepare", f"input={copy.root / name}", f"out={copy.root}/out")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100 + "]" * 100, "9" * 5000, f"[{'9' * 41}]", '"\\ud800"']
)
def test_json(text, tmp_path):
    with pytest.raises(ValueError):
        parse_json(text)
    (tmp_path / "net.json").write_text(text)
    with pytest.raises(FlextronError, match="net.json: not readable as JSON: "):
        SubNetwork.from_file(tmp_path / "net.json")


def test_json_of_many_values(tmp_path):
    (tmp_path / "net.json").write_text(f"[{'[],' * (2**20)}[]]")
    with pytest.raises(FlextronError, match="net.json: expected an object"):
        SubNetwork.from_file(tmp_path / "net.json")


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    "text",
    [ALIASES, "a: &a [*a]", "&a {x: *a}", "[" * 20_000, "{a: " * 20_000, "9" * 5000, "!!python/object/apply:os.system [x]"],
)
def test_yaml(text, tmp_path):
    with pytest.raises(ValueError):
        parse_yaml(text)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(FlextronError, match="config.yaml: cannot be read"):
        read("elastic", tmp_path / "config.yaml")


def test_numbers_that_no_model_has(copy):
    file = copy.checkpoint / "flextron.json"
    good = json.loads(file.read_text())
    for key in ("num_layers", "hidden_size", "vocab_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings"):
        for number in (10**18, 10**39):
            file.write_text(json.dumps({**good, "model": {**good["model"], key: number}}))
            with pytest.raises(FlextronError, match="flextron.json"):
                open_checkpoint(copy.checkpoint)


def test_a_compressed_record(copy):
    """torch.save never compresses. A compressed record is refused, because it may unpack to a thousand times its size."""
    made = io.BytesIO()
    torch.save({"a": torch.zeros(2**20)}, made)
    packed = io.BytesIO()
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    largest = max(copy.checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(packed.getvalue())
    copy.describe()
    assert refusal("export", f"checkpoint={copy.root}/run", f"out={copy.root}/out")


def test_a_tokenizer_of_holes(copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = Path(copy.root / "run" / "tokenizer" / name)
        file.touch()
        os.truncate(file, LARGE)
    assert "is larger than" in refusal("generate", f"checkpoint={copy.root}/run", "prompt=x")
