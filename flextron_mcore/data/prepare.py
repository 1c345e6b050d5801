"""Conversion of text to Megatron's indexed datasets: training and validation split, tokenizer, token files, `data.json`.

The corpus is read up to three times: to split it, to sample text for the tokenizer, and to tokenize. Memory holds about 100 bytes
a document and one batch of text. The first reading finds unreadable input, before tokenizer training and tokenization start.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import FlextronError
from ..digests import DATA_FILE
from ..files import expanded
from .builtin import builtin_inputs
from .corpus import Corpus, open_corpus
from .existing import DATA_VERSION
from .formats import stem
from .shards import Part, Shards
from .split import Documents, split
from .tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from .writers import InProcess, Writer, processes

SAMPLE_BYTES = 20_000_000  # maximum text that a tokenizer is trained on, all domains together
_DOMAIN_NAME = re.compile(r"\w[\w .+-]*")  # restricted because a domain's name becomes part of file names


def parse_inputs(value: str | list | Mapping) -> dict[str, list[str]]:
    """{domain: paths} from the value of `input=`.

    `value` is a path, a list of paths, a mapping {domain: path or list of paths}, or "builtin" (text of the Python installation).
    A path without a domain's name becomes a domain of its own, with the name of the directory or of the file without suffixes.

    Raises FlextronError if two paths would get the same domain name, if a domain's name cannot be part of a file name, if no path
    is given, or if `value` has another type.
    """
    if value == "builtin":
        return builtin_inputs()
    if isinstance(value, Mapping):
        inputs = {_check_domain(name): _paths(paths, f"input.{name}") for name, paths in value.items()}
    else:
        inputs = {}
        for path in _paths(value, "input"):
            name = _check_domain(_stem(path), path)
            if name in inputs:
                raise FlextronError(
                    f"input: '{inputs[name][0]}' and '{path}' would both be domain '{name}': name them, input={{NAME: PATH, ...}}"
                )
            inputs[name] = [path]
    if not inputs:
        raise FlextronError("input: no text given; use a path, a list of paths, {domain: path} or builtin")
    return inputs


def prepare_data(
    inputs: Mapping[str, Sequence[str | Path]],
    out: str | Path,
    tokenizer: str | Path | None = None,
    vocab_size: int = 8192,
    text_key: str = "text",
    valid_fraction: float = 0.05,
    seed: int = 1234,
    skip_bad: bool = False,
    add_bos: bool | None = None,
    parse_special_tokens: bool | None = None,
    workers: int = 1,
    progress: Callable[[str], None] | None = None,
    work: Path | None = None,
) -> dict[str, Any]:
    """Tokenize text and write DOMAIN_{train,valid}.{bin,idx} for each domain, tokenizer/ and, last, data.json.

    Args:
        inputs: {domain: paths}, from `parse_inputs`.
        out: existing, empty directory to write into.
        tokenizer: Hugging Face tokenizer directory; None trains a byte-level BPE on the training text.
        vocab_size: tokens of the trained BPE.
        text_key: field of a JSON object, or column of a Parquet file, that holds the text.
        valid_fraction: share of the text of every domain that is held out for validation, above 0 and at most 0.5.
        seed: seed of the split into training and validation text.
        skip_bad: skip files and entries that cannot be read; False: raise FlextronError at the first.
        add_bos: put the BOS token in front of every document; None: as the tokenizer does.
        parse_special_tokens: encode the text of a special token, such as <|endoftext|>, as this token; False: as ordinary text;
            None: as the tokenizer does.
        workers: processes that tokenize, each a shard at a time; 1: this process, with a thread on every core.
        progress: function (line) called with each status line, a text; None: none.
        work: directory for finished shards of the token files, on the file system of `out`. A killed call leaves them there, and
            the next call with the same arguments and text continues after them. None: start from the beginning.

    Returns:
        `vocab_size`, `eod` (id of the end-of-document token), `domains` and `skipped`, a list of [file or file and line, reason].
        `domains` is {name: its entry in data.json (the fields of `Domain`, paths relative to `out`), with `bytes_per_token`,
        `files` {format: number}, `left_out` {reason: number of files} and `empty_texts` added}.

    Raises:
        FlextronError: unreadable or too little input, an unusable tokenizer, or `out` is not an empty directory.
    """
    out = Path(out)
    say = progress or (lambda line: None)
    if not out.is_dir() or any(out.iterdir()):
        raise FlextronError(f"{out}: not an empty directory to write the prepared data into: choose another, or empty it")
    if not 0 < valid_fraction <= 0.5:
        raise FlextronError(f"valid_fraction={valid_fraction} must be above 0 and at most 0.5")
    chosen = (add_bos, parse_special_tokens)
    tokens = open_tokenizer(tokenizer, *chosen) if tokenizer is not None else None
    parts = _read(
        {domain: open_corpus(domain, paths, text_key, skip_bad) for domain, paths in inputs.items()}, valid_fraction, seed, say
    )
    if tokens is None:
        say(f"training a byte-level tokenizer of {vocab_size} tokens")
        tokens = train_tokenizer(_sample(parts), vocab_size)
        if chosen != (None, None):
            with tempfile.TemporaryDirectory() as folder:
                tokens.save(folder)
                tokens = open_tokenizer(folder, *chosen)
    tokens.save(out / "tokenizer")
    shards = Shards(work or out / ".shards", parts, out / "tokenizer")
    domains, whole = {}, False
    try:
        with _writer(workers, tokens, out / "tokenizer", chosen) as writer:
            shards.write(parts, writer)
        for number, part in enumerate(parts):
            train, valid = shards.join(number, part, tokens.vocab_size, out)
            domains[part.domain] = {
                "train": f"{part.domain}_train",
                "valid": f"{part.domain}_valid",
                "train_tokens": train,
                "valid_tokens": valid,
                "documents": len(part.share),
                "bytes": int(part.documents.sizes.sum()),
            }
        whole = True
    finally:
        shards.close(keep=work is not None and not whole)
    table = {
        "version": DATA_VERSION,
        "tokenizer": "tokenizer",
        "vocab_size": tokens.vocab_size,
        "eod": tokens.eod,
        "add_bos": add_bos,
        "parse_special_tokens": parse_special_tokens,
        "domains": domains,
    }
    (out / DATA_FILE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    total = {name: d["train_tokens"] + d["valid_tokens"] for name, d in domains.items()}
    return {
        "vocab_size": tokens.vocab_size,
        "eod": tokens.eod,
        "domains": {
            part.domain: {
                **domains[part.domain],
                "bytes_per_token": domains[part.domain]["bytes"] / total[part.domain],
                "files": dict(part.corpus.read),
                "left_out": dict(part.corpus.left_out),
                "empty_texts": part.corpus.empty,
            }
            for part in parts
        },
        "skipped": [[place, reason] for part in parts for place, reason in part.corpus.skipped.items()],
    }


def _writer(
    workers: int, tokens: Tokenizer, directory: Path, chosen: tuple[bool | None, bool | None]
) -> contextlib.AbstractContextManager[Writer]:
    """Context with a writer of shards. chosen: add_bos and parse_special_tokens, as given; the others as in `prepare_data`."""
    if workers == 1:
        return contextlib.nullcontext(InProcess(tokens))
    return processes(workers, tokens, directory, *chosen)


def _read(corpora: Mapping[str, Corpus], fraction: float, seed: int, say: Callable[[str], None]) -> list[Part]:
    """Read all domains once and split each into training and validation text.

    Args:
        corpora: {domain: its documents}.
        fraction: share of the bytes of each domain for validation.
        seed: seed of the split.
        say: function that is called with status lines.

    Raises:
        FlextronError: unreadable input, a domain without a document, or one too small for validation text.
    """
    found = []
    for domain, corpus in corpora.items():
        say(f"reading {domain}")
        documents = Documents.of(domain, corpus, seed)
        say(f"{domain}: {len(documents.sizes)} documents; {corpus.summary()}")
        if not len(documents.sizes):
            raise FlextronError(f"domain '{domain}' has no document ({corpus.summary()}): leave it out of input=")
        found.append(documents)
    shares = split(found, fraction)
    return [Part(*facts) for facts in zip(corpora, corpora.values(), found, shares, strict=True)]


def _sample(parts: list[Part]) -> Iterator[str]:
    """Training text for the tokenizer, about SAMPLE_BYTES at most, from randomly chosen documents.

    Every domain gives the same amount of text, or all that it has.
    """
    for part in parts:
        left = SAMPLE_BYTES // len(parts)
        train, draws = part.share < 1, part.documents.draws
        order = np.argsort(draws[train], kind="stable")
        last = min(np.searchsorted(np.cumsum(part.documents.sizes[train][order]), left), len(order) - 1)
        threshold = draws[train][order][last]  # documents with draws up to the threshold hold `left` bytes
        for i, valid, text in part.texts():
            if not valid and draws[i] <= threshold and left > 0:
                yield text[:left]
                left -= len(text)


def _paths(value: object, name: str) -> list[str]:
    """List of paths from a path or a list of paths. name: key for the message. Raises FlextronError for another type."""
    values = [value] if isinstance(value, str | os.PathLike) else value
    if (
        not isinstance(values, Sequence)
        or not all(isinstance(v, str | os.PathLike) and str(v) for v in values)
        or not len(values)
    ):
        raise FlextronError(f"{name}: must be a path or a list of paths, not {json.dumps(value, default=str)}")
    return [str(v) for v in values]


def _stem(path: str) -> str:
    """Name of a directory, or name of a file without its suffixes: the domain of a path without a given domain."""
    name = Path(os.path.abspath(expanded(path))).name
    return name if expanded(path).is_dir() else stem(name)


def _check_domain(name: object, path: str | None = None) -> str:
    """Return a domain's name if it can be part of a file name, else raise FlextronError. path: source of the name, or None."""
    if not isinstance(name, str) or not _DOMAIN_NAME.fullmatch(name):
        where = f"input={path!r}: the domain's name" if path else "input: the domain's name"
        remedy = ": give it another, input={NAME: PATH}" if path else ""
        raise FlextronError(
            f"{where} {name!r} must begin with a letter or digit and hold letters, digits, spaces and . _ + - only{remedy}"
        )
    return name
