"""Tokenizer that a run stores: the checkpoint's, overlaid with the data's; and the token ids that end a generated text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.data import tokenizer_files
from flextron_mcore.data.blend import PreparedData
from flextron_mcore.files import explain, read_json

_GENERATION_FILE = "generation_config.json"
# Rules by which transformers changes logits of greedy decoding too, or searches otherwise: {key: value without effect}.
_RULES = {
    **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": [], "sequence_bias": {}, "num_beams": 1},
    **{"suppress_tokens": [], "begin_suppress_tokens": [], "min_length": 0, "min_new_tokens": 0, "guidance_scale": 1.0},
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "stop_strings")),
}


def tokenizer_directories(info: CheckpointInfo, data: PreparedData) -> list[Path]:
    """Directories whose files make up the tokenizer of a run; a file of a later directory replaces one of an earlier directory.

    Empty if the checkpoint has no tokenizer. The checkpoint's tokenizer comes first, with chat templates and
    generation_config.json. If `flextron prepare` was told how to add BOS or parse special tokens, the data's tokenizer follows,
    so that prompts and exports agree with the training text. A model without a checkpoint (`info.path` None) takes the data's.
    """
    if info.path is None:
        return [data.tokenizer]
    if info.tokenizer is None:
        return []
    return [info.tokenizer, data.tokenizer] if data.own_tokens else [info.tokenizer]


def copy_tokenizer(info: CheckpointInfo, data: PreparedData, target: Path) -> None:
    """Copy the files of a run's tokenizer (`tokenizer_directories`) into the directory `target`; nothing if there is none.

    Args:
        info: checkpoint that the run starts from.
        data: prepared data.
        target: directory, created if it does not exist.
    """
    for folder in tokenizer_directories(info, data):
        tokenizer_files.copy_tokenizer(folder, target)


def end_tokens(folder: Path, info: CheckpointInfo, eod: int) -> frozenset[int]:
    """Token ids that end a generated text, as in transformers: eos_token_id of generation_config.json, none if it has none.

    Without that file they are those of the imported config.json, else `eod`.

    Args:
        folder: tokenizer directory.
        info: checkpoint.
        eod: end-of-document token of the tokenizer.

    Raises:
        FlextronError: generation_config.json is damaged, or eos_token_id is neither an id nor a list of ids.
    """
    if (folder / _GENERATION_FILE).is_file():
        found = _generation_config(folder).get("eos_token_id")
        found = [] if found is None else found
    else:
        found = (info.hf_config or {}).get("eos_token_id")
        found = eod if found is None else found
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) for i in found):
        raise FlextronError(f"{folder / _GENERATION_FILE}: eos_token_id is {found}, neither an id nor a list of them: correct it")
    return frozenset(found)


def other_rules(folder: Path) -> dict[str, Any]:
    """Entries of generation_config.json that change transformers' likeliest text, and that `flextron generate` does not apply.

    Args:
        folder: tokenizer directory.

    Raises:
        FlextronError: generation_config.json is damaged.
    """
    values = _generation_config(folder)
    return {key: values[key] for key, neutral in _RULES.items() if values.get(key) not in (None, neutral)}


def _generation_config(folder: Path) -> dict[str, Any]:
    """Content of generation_config.json; {} without the file. Raises FlextronError if it is damaged."""
    file = folder / _GENERATION_FILE
    if not file.is_file():
        return {}
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise FlextronError(f"{file}: is not a JSON object ({explain(error)}): copy it again") from None
    if not isinstance(values, dict):
        raise FlextronError(f"{file}: is not a JSON object: copy it again")
    return values
