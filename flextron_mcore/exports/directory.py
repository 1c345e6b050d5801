"""Steps that every format takes: check the directory, copy the tokenizer, measure what was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from flextron_mcore.checkpoint.hf import copy_tokenizer
from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import read_vocabulary
from flextron_mcore.exports.formats import Job
from flextron_mcore.runtime.disk import check_space


def begin(job: Job, size: int, tokenizer: str = "") -> None:
    """Check that job.out is an empty directory on a disk with room for `size` bytes; put the tokenizer into a folder of it.

    Raises FlextronError. Call on the main process.
    """
    check_empty(job.out)
    check_space(job.out, size)
    if job.tokenizer:
        take_tokenizer(job.tokenizer, job.out / tokenizer)


def check_empty(out: Path) -> None:
    """Raise FlextronError unless `out` is an empty directory."""
    if not out.is_dir() or any(out.iterdir()):
        raise FlextronError(f"out={out}: not an empty directory")


def figures(out: Path, name: str, architecture: str, parameters: int) -> dict[str, Any]:
    """The result of `write` of the format `name`, with the bytes and the number of all files. Call on the main process."""
    sizes = [file.stat().st_size for file in out.rglob("*") if file.is_file()]
    return {
        "format": name,
        "architecture": architecture,
        "parameters": parameters,
        "bytes": sum(sizes),
        "files": len(sizes),
    }


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write an object, two spaces a level."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def take_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of the directory `source` into `target`.

    Raises FlextronError where there is none, or a file of it is damaged. The copy's configuration says that there are no token
    types, unless it says which: transformers 4 would make them up, and no model here takes them.
    """
    if not copy_tokenizer(source, target):
        raise FlextronError(f"tokenizer={source}: no tokenizer in it (looked for tokenizer.json, tokenizer.model, vocab.json)")
    for file in sorted(source.glob("*.json")):
        if (target / file.name).is_file():
            _check(file)
    if (source / "tokenizer.json").is_file():
        try:
            Tokenizer.from_file(str(source / "tokenizer.json"))
        except Exception as error:  # of the Rust library, which has no class of its own
            reason = " ".join(str(error).split())[:200]
            raise FlextronError(f"tokenizer={source}: tokenizer.json is damaged: {reason}") from None
    read_vocabulary(source)
    config_file = target / "tokenizer_config.json"
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(file: Path) -> None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FlextronError(f"tokenizer={file.parent}: {file.name} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise FlextronError(f"tokenizer={file.parent}: {file.name} is damaged: not a JSON object")
