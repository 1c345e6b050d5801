"""`flextron prepare`: conversion of text to Megatron datasets, and description of existing ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError
from flextron_mcore.data.existing import describe, parse_paths
from flextron_mcore.data.prepare import parse_inputs, prepare_data
from flextron_mcore.runs.output import check_output, serial_output, unfinished, write_metrics
from flextron_mcore.runs.terminal import print_table, say
from flextron_mcore.runtime.ranks import is_main_process
from flextron_mcore.settings.schema import show
from flextron_mcore.settings.stages import PrepareSettings

# keys that have no effect on existing corpora
_OF_TEXT = ("text_key", "skip_bad", "valid_fraction", "vocab_size", "add_bos", "parse_special_tokens", "workers")


def run(settings: PrepareSettings) -> dict[str, Any]:
    """Write token files of each domain, and the tokenizer; return the content of metrics.json. Other ranks return {} at once.

    With settings.paths, writes a description of existing token files and the tokenizer.
    """
    if not is_main_process():
        return {}
    check_output(Path(settings.out), settings.overwrite)
    make = _tokenize(settings) if settings.paths is None else _describe(settings)
    with serial_output(settings) as out:
        figures = make(out)
        metrics = write_metrics(out, "prepare", figures)
    names = ("documents", "bytes", "train_tokens", "valid_tokens")
    rows = [[name, *("-" if d[key] is None else d[key] for key in names)] for name, d in figures["domains"].items()]
    print_table("prepared data", ["domain", "documents", "bytes", "train tokens", "validation tokens"], rows)
    return metrics


def _tokenize(settings: PrepareSettings) -> Callable[[Path], dict[str, Any]]:
    """Function from a directory to the figures of the text that it tokenizes into it. Checks the inputs at once."""
    _check_unused(settings, "split", needs="paths")
    inputs = parse_inputs(settings.input)
    return lambda out: prepare_data(
        inputs,
        out,
        tokenizer=settings.tokenizer,
        vocab_size=settings.vocab_size,
        text_key=settings.text_key,
        valid_fraction=settings.valid_fraction,
        seed=settings.seed,
        skip_bad=settings.skip_bad,
        add_bos=settings.add_bos,
        parse_special_tokens=settings.parse_special_tokens,
        workers=settings.workers,
        progress=lambda text: say(f"prepare: {text}"),
        work=unfinished(Path(settings.out)),
    )


def _describe(settings: PrepareSettings) -> Callable[[Path], dict[str, Any]]:
    """Function from a directory to the figures of the existing corpora that it describes there. Checks the keys at once."""
    if settings.input is not None:
        raise FlextronError("paths, input: are two sources of data: prepare each into an out of its own, or leave one out")
    _check_unused(settings, *_OF_TEXT, needs="input")
    if settings.tokenizer is None:
        raise FlextronError(
            "paths: tokenizer is not set: name the tokenizer that the corpora were made with, tokenizer=DIR, or that of a "
            "checkpoint, tokenizer=CHECKPOINT/tokenizer"
        )
    blends = parse_paths(settings.paths)
    return lambda out: describe(blends, settings.split, settings.tokenizer, out, lambda text: say(f"prepare: {text}"))


def _check_unused(settings: PrepareSettings, *names: str, needs: str) -> None:
    """Raise FlextronError for a key of another value than its default, which has no effect without the key `needs`."""
    for name in names:
        if (value := getattr(settings, name)) != getattr(PrepareSettings(), name):
            raise FlextronError(f"{name}={show(value)} has an effect with {needs}= only: leave {name} out")
