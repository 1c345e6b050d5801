"""Tokenizer of a run: the model's, with the choices that the data were prepared with; and the tokens that end its texts."""

from __future__ import annotations

from pathlib import Path

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.data import tokenizer_files
from flextron_mcore.data.blend import PreparedData
from flextron_mcore.files import read_json

_GENERATION_FILE = "generation_config.json"


def tokenizer_directories(info: CheckpointInfo, data: PreparedData) -> list[Path]:
    """Directories whose files, the later over the earlier, are the tokenizer of a run from `info` on `data`; may be empty.

    The model's has chat templates and generation_config.json. Where `prepare` was told how to add BOS or parse special tokens,
    the data's goes over it, so that prompts and exports agree with the training text.
    """
    if info.path is None:
        return [data.tokenizer]
    if info.tokenizer is None:
        return []
    return [info.tokenizer, data.tokenizer] if data.own_tokens else [info.tokenizer]


def copy_tokenizer(info: CheckpointInfo, data: PreparedData, target: Path) -> None:
    """Write the tokenizer of a run from `info` on `data` to the directory `target`; nothing if there is none.

    Args:
        info: checkpoint that the run starts from.
        data: prepared data.
        target: directory, which may exist.
    """
    for folder in tokenizer_directories(info, data):
        tokenizer_files.copy_tokenizer(folder, target)


def end_tokens(folder: Path, info: CheckpointInfo, eod: int) -> frozenset[int]:
    """Ids that end a generated text, as in transformers: of generation_config.json, else of the imported config.json, else `eod`.

    Args:
        folder: tokenizer directory.
        info: checkpoint.
        eod: end-of-document token of the tokenizer.

    Raises:
        FlextronError: generation_config.json is damaged.
    """
    file = folder / _GENERATION_FILE
    values = {}
    if file.is_file():
        try:
            values = read_json(file)
            found = values.get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise FlextronError(f"{file}: is not a JSON object ({error}): copy it again") from None
    else:
        found = None
    if found is None:
        found = (info.hf_config or {}).get("eos_token_id")
    found = [eod] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) for i in found):
        raise FlextronError(f"{file}: eos_token_id is {found}, neither an id nor a list of them: correct it")
    return frozenset(found)
