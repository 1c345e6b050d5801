"""Check and copy of Hugging Face tokenizer directories, without code and without references to other files. No torch import."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import FlextronError
from ..families.code_keys import CODE_KEYS
from ..files import check_file, check_folder, explain, read_bytes, read_json

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
)
_TEMPLATES = "additional_chat_templates"  # a directory, beside chat_template.jinja
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
_LARGEST = 2**28  # bytes of one file


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer and generation_config.json of a Hugging Face directory into `target`, which is created.

    Leaves out keys that name code or other files. Returns False, and copies nothing, if the directory has no tokenizer. Raises
    FlextronError for a symbolic link out of the directory, an entry that is not a regular file, and damaged JSON.
    """
    if not has_tokenizer(source):
        return False
    target.mkdir(parents=True, exist_ok=True)
    for file in _files(source):
        data = read_bytes(file, largest=_LARGEST)
        values = _configuration(file)
        if dropped := _foreign(values, file.name):
            values = {key: value for key, value in values.items() if key not in dropped}
            data = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
        (target / file.name).write_bytes(data)
    for file in sorted((source / _TEMPLATES).glob("*.jinja")):
        data = read_bytes(file)
        (target / _TEMPLATES).mkdir(exist_ok=True)
        (target / _TEMPLATES / file.name).write_bytes(data)
    return True


def has_tokenizer(folder: Path) -> bool:
    """True if a directory has one of VOCABULARY_FILES."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def check_tokenizer_files(folder: Path) -> None:
    """Check that opening a tokenizer directory with transformers would read regular files of this directory only.

    Raises FlextronError for a symbolic link out of the directory, for an entry that is not a regular file, for a damaged
    tokenizer_config.json, and if a *_file key of it names an existing file, which transformers would read.
    """
    for place in (folder, folder / _TEMPLATES):
        if place.is_dir():
            check_folder(place)
    for name in (*_FILES, "config.json"):
        check_file(folder / name)
    config = folder / "tokenizer_config.json"
    for key, name in (_configuration(config) if config.is_file() else {}).items():
        if key.endswith("_file") and isinstance(name, str) and "\0" not in name and Path(name).exists():
            raise FlextronError(f"{config}: {key} names {name}, a file outside of this directory: remove the key")


def code_keys(folder: Path) -> list[str]:
    """Keys that name code (CODE_KEYS) in the tokenizer files and config.json of a Hugging Face directory, each as "FILE: KEY".

    Only keys at the top level of a file are found, and vocabularies are not read. Raises FlextronError for a symbolic link out of
    the directory, a tokenizer file that is not a regular file, and damaged JSON.
    """
    found = []
    for file in (*_files(folder), folder / "config.json"):
        if file.is_file():
            found += [f"{file.name}: {key}" for key in _foreign(_configuration(file), file.name) if key in CODE_KEYS]
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Tokenizer files of a Hugging Face directory. Raises FlextronError for one that is not a regular file of the directory."""
    for pattern in _FILES:
        for file in sorted(folder.glob(pattern)):
            check_file(file)
            yield file


def _configuration(file: Path) -> dict[str, Any]:
    """JSON object in a settings file; {} for vocabularies, for other JSON, and for files of another suffix than .json.

    Raises FlextronError for damaged JSON.
    """
    if file.suffix != ".json" or file.name in _VOCABULARIES:
        return {}
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise FlextronError(f"tokenizer={file.parent}: {file.name} is damaged: {explain(error)}: copy it again") from None
    return values if isinstance(values, dict) else {}


def _foreign(values: dict[str, Any], name: str) -> list[str]:
    """Keys of a file's JSON object that name code or, in tokenizer_config.json, another file. name: name of the file."""
    return [key for key in values if key in CODE_KEYS or (name == "tokenizer_config.json" and key.endswith("_file"))]
