"""Tokenizer directories made by others: copied without code, and not read where they name files elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import open_tokenizer
from flextron_mcore.data.tokenizer_files import code_keys, copy_tokenizer


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        (folder / name).write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_text("x")
    return folder


def test_known_files_are_copied(source, tmp_path):
    assert copy_tokenizer(source, tmp_path / "copy")
    assert {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()} == {
        name: (source / name).read_bytes()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    }


def test_a_directory_without_a_vocabulary(source, tmp_path):
    (source / "tokenizer.json").unlink()
    assert not copy_tokenizer(source, tmp_path / "copy") and not (tmp_path / "copy").exists()


def test_keys_that_name_code_are_left_out(source, tmp_path):
    code = {
        "auto_map": {"AutoTokenizer": ["evil.T", None]},
        "custom_pipelines": {},
        "model_max_length": 9,
        "tokenizer_file": "/x",
    }
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        (source / name).write_text(json.dumps(code))
    copy_tokenizer(source, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text()) == {"model_max_length": 9}
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == {
        "model_max_length": 9,
        "tokenizer_file": "/x",
    }
    assert code_keys(source) == [
        f"{name}: {key}"
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        for key in ("auto_map", "custom_pipelines")
    ]


def test_a_file_elsewhere_is_not_read(source, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer_config.json").write_text(json.dumps({"vocab_file": str(tmp_path / "secret")}))
    with pytest.raises(FlextronError, match="vocab_file names .*secret, a file outside of this directory: remove the key"):
        open_tokenizer(source)
