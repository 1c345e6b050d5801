"""The tokenizer that goes along with an export."""

from __future__ import annotations

import json
from pathlib import Path

from flextron_mcore.checkpoint.hf_import import copy_tokenizer
from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import read_vocabulary


def take_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of the directory `source` into `target`.

    Raises FlextronError where there is none, or a file of it is damaged. A tokenizer without token types in its configuration is
    told so: transformers 4 would make them up, and no model here takes them.
    """
    if not copy_tokenizer(source, target):
        raise FlextronError(f"tokenizer={source}: no tokenizer in it (looked for tokenizer.json, tokenizer.model, vocab.json)")
    for file in sorted(source.glob("*.json")):
        if (target / file.name).is_file():
            _check(file)
    if (source / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

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
