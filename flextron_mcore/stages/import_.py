"""`flextron import`: conversion of a Hugging Face checkpoint to an elastic checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flextron_mcore.axes import AXES
from flextron_mcore.checkpoint.hf import HFCheckpoint, import_hf, open_hf
from flextron_mcore.checkpoint.store import CheckpointInfo, iteration_path
from flextron_mcore.checkpoint.writer import write_streaming
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.data.tokenizer import Tokenizer, keep_ids, open_tokenizer, opened_unlike_files, read_vocabulary
from flextron_mcore.data.tokenizer_files import code_keys, copy_tokenizer, has_tokenizer
from flextron_mcore.runs.memory import import_line
from flextron_mcore.runs.output import check_output, new_output, write_metrics
from flextron_mcore.runs.terminal import print_table, progress_bar, say, warn
from flextron_mcore.runtime import distributed
from flextron_mcore.runtime.ranks import on_main_process, processes_on_cpu
from flextron_mcore.settings.sections import SpaceSettings
from flextron_mcore.settings.stages import ImportSettings
from flextron_mcore.space import AUTOMATIC_GRANULARITIES, ElasticSpace, count_parameters


def run(settings: ImportSettings) -> dict[str, Any]:
    """Convert the Hugging Face checkpoint settings.hf into an elastic checkpoint, a few tensors at a time. Call on all ranks.

    Neurons, heads and channels keep the order that they have in the Hugging Face checkpoint. Each rank converts a share of the
    tensors. Returns the content of metrics.json: sizes, dtype, model and space, and with verify=true the differences from
    transformers.
    """
    check_output(Path(settings.out), settings.overwrite)
    if settings.verify and (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise FlextronError(f"verify=true: compares in one process, not in {ranks}: start one, or leave verify=true out")
    source, opened = open_hf(Path(settings.hf)), opened_unlike_files(Path(settings.hf))
    source = _with_vocabulary(source, opened, settings.resize_vocabulary)
    _check_token_ids(source)
    if named := code_keys(Path(settings.hf)):
        warn(f"{settings.hf}: names code of its own ({', '.join(named)}), which is neither run nor taken along")
    info, tensors = import_hf(source, asdict(settings.space), settings.dtype)
    _warn(source, info)
    size = sum(t.dtype.itemsize * _numel(t.shape) for t in tensors.values())
    say(import_line(settings, info))
    with processes_on_cpu(), new_output(settings) as out:
        folder = iteration_path(out, 0)
        folder.mkdir(parents=True, exist_ok=True)
        with progress_bar(total=size, unit="B", unit_scale=True, desc="import") as bar:
            write_streaming(folder, info, tensors, bar.update)
        figures = {
            "parameters": count_parameters(info.model),
            "bytes": size,
            "dtype": info.dtype,
            "tokenizer": on_main_process(lambda: _copy_tokenizer(Path(settings.hf), opened, out / "tokenizer")),
            **(_verified(settings, replace(info, path=folder)) if settings.verify else {}),
            "model": info.model.to_dict(),
            "space": info.space.to_dict(),
        }
        metrics = write_metrics(out, "import", figures)
    space = info.space
    print_table(
        f"imported {settings.hf}: {figures['parameters']:,} parameters, {info.dtype}",
        ["space", "candidates", "chosen"],
        [
            *(
                [name, value, _why(settings.space, info.model, space, name)]
                for name, value in (
                    *((name, ", ".join(map(str, sizes))) for name, sizes in space.sizes.items()),
                    ("attention_unit", space.attention_unit),
                    ("granularity", str(space.granularity)),
                )
            ),
        ],
    )
    return metrics


def _copy_tokenizer(source: Path, opened: Tokenizer | None, target: Path) -> bool:
    """Copy the tokenizer of a Hugging Face directory, with the ids that it has there. Returns False if there is none.

    Args:
        source: the directory.
        opened: result of `opened_unlike_files`.
        target: directory for the copy.
    """
    copied = copy_tokenizer(source, target)
    if copied and opened:
        keep_ids(opened, target)
    return copied


def _why(settings: SpaceSettings, model: ModelConfig, space: ElasticSpace, name: str) -> str:
    """Reason why a key of the space has its value, for the table of the import.

    Args:
        settings: space section of the settings.
        model: architecture of the full model.
        space: space that was built.
        name: key.
    """
    given = getattr(settings, name)
    if name in AXES:
        return AXES[name].reason(model, space.granularity, space.attention_unit, given, settings.multiple or 1)
    if given is not None:
        return "as given"
    if name == "granularity":
        return f"largest of {', '.join(map(str, AUTOMATIC_GRANULARITIES))} that divides all candidates"
    if space.attention_unit == "kv_group":
        return "all candidates are whole KV groups"
    return f"whole KV groups have {model.query_heads_per_group} query heads each, too many for these candidates"


def _with_vocabulary(source: HFCheckpoint, opened: Tokenizer | None, resize: bool) -> HFCheckpoint:
    """Checkpoint whose vocabulary has a row for each token of its tokenizer if `resize`, else the checkpoint as it is.

    Without `resize`, prints a warning that names the first token without a row. With it, raises FlextronError if no file lists
    the tokens, or if transformers cannot open the tokenizer.

    Args:
        source: checkpoint.
        opened: result of `opened_unlike_files` for its directory.
        resize: resize_vocabulary.
    """
    if resize and opened is None and has_tokenizer(source.path):
        opened = open_tokenizer(source.path)  # which says why it cannot be opened: rows are added for what transformers finds
    vocabulary = opened.vocabulary if opened else read_vocabulary(source.path)
    if vocabulary is None and resize:
        raise FlextronError(
            f"resize_vocabulary=true: {source.path} has no tokenizer.json or vocab.json, which count the tokens: leave it out"
        )
    beyond = vocabulary.beyond(source.model.vocab_size) if vocabulary else None
    if beyond is None:
        return source
    token, i = beyond
    if not resize:
        warn(
            f"{source.path}: the tokenizer has the token {token[:40]!r} with id {i}, and the model only rows 0 to "
            f"{source.model.vocab_size - 1}: import with resize_vocabulary=true, or remove the token from the tokenizer"
        )
        return source
    return source.resized(max(vocabulary.tokens.values()) + 1)


def _check_token_ids(source: HFCheckpoint) -> None:
    """Raise FlextronError for ids in config.json with which transformers cannot build the model.

    They are of a wrong type, or the id for padding has no row, which only GPT-2's class ignores.
    """
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = source.config.get(key)
        ids = found if isinstance(found, list) and key == "eos_token_id" else [] if found is None else [found]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise FlextronError(f"{source.path / 'config.json'}: {key} is {json.dumps(found)}, not a token's id: correct it")
    pad, rows = source.config.get("pad_token_id"), source.model.vocab_size
    if isinstance(pad, int) and not -rows <= pad < rows and source.model.position_embedding_type == "rope":
        raise FlextronError(
            f"{source.path / 'config.json'}: pad_token_id is {pad}, not a row of the embedding, 0 to {rows - 1}: set it to null, "
            "or import with resize_vocabulary=true if the tokenizer has this token"
        )


def _verified(settings: ImportSettings, info: CheckpointInfo) -> dict[str, Any]:
    """Result of `compare_with_transformers`, whose largest difference is printed. Raises FlextronError where the two differ."""
    from flextron_mcore.evaluation.imported import compare_with_transformers  # late: the import alone builds no model

    distributed.initialize(seed=settings.seed)
    found = compare_with_transformers(info, Path(settings.hf), settings.seed)
    largest = max(found.values())
    say(f"compared with transformers on random tokens: the largest difference is {largest:.1e} of the largest value")
    return found


def _warn(source: HFCheckpoint, info: CheckpointInfo) -> None:
    """Warn of an output layer that config.json ties and the files do not, and of tensors that are rounded to info.dtype."""
    if not source.tied:
        warn(
            f"{source.path / 'config.json'}: ties the output layer to the embedding (tie_word_embeddings), but another one is "
            "stored: the model is imported untied, as transformers loads it"
        )
    if rounded := source.stored_otherwise(info.dtype):
        more = f" and {len(rounded) - 3} more" if len(rounded) > 3 else ""
        warn(
            f"{len(rounded)} tensor(s) stored with more digits become {info.dtype}: {', '.join(rounded[:3])}{more}: set "
            "dtype=fp32 to keep them"
        )


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
