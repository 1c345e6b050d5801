"""Tokenizer that a run stores: the checkpoint's, overlaid with the data's; and the token ids that end a generated text."""

from __future__ import annotations

from pathlib import Path

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.data import tokenizer_files
from flextron_mcore.data.blend import PreparedData
from flextron_mcore.files import explain, read_json

_GENERATION_FILE = "generation_config.json"


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
    """Token ids that end a generated text: eos_token_id of generation_config.json, else of the imported config.json, else `eod`.

    transformers takes them from the same places.

    Args:
        folder: tokenizer directory.
        info: checkpoint.
        eod: end-of-document token of the tokenizer.

    Raises:
        FlextronError: generation_config.json is damaged, or eos_token_id is neither an id nor a list of ids.
    """
    file = folder / _GENERATION_FILE
    values = {}
    if file.is_file():
        try:
            values = read_json(file)
            found = values.get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise FlextronError(f"{file}: is not a JSON object ({explain(error)}): copy it again") from None
    else:
        found = None
    if found is None:
        found = (info.hf_config or {}).get("eos_token_id")
    found = [eod] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) for i in found):
        raise FlextronError(f"{file}: eos_token_id is {found}, neither an id nor a list of them: correct it")
    return frozenset(found)
