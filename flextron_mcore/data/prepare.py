"""Text into Megatron's indexed datasets: split into training and validation text, tokenizer, token files, `data.json`.

The corpus is read up to three times (split, tokenizer sample, tokens), so memory does not grow with it: 16 bytes a document and
one batch of text are held. What is wrong with the input shows in the first reading, before anything slow starts.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import FlextronError
from .builtin import builtin_inputs
from .corpus import JSONL_SUFFIXES, Corpus, open_corpus
from .tokenizer import Tokenizer, groups, open_tokenizer, train_tokenizer

DATA_FILE = "data.json"
DATA_VERSION = 1
SAMPLE_BYTES = 20_000_000  # text that a tokenizer is trained on, all domains together
_DOMAIN_NAME = re.compile(r"\w[\w .+-]*")  # it becomes part of file names


def parse_inputs(value: str | list | Mapping) -> dict[str, list[str]]:
    """The user's `input=` as domain -> list of paths.

    `value` is a path or a list of paths (each is a domain, named after the file without suffix or the directory), a mapping
    {domain: path or list of paths}, or "builtin" (text of the Python installation, see `builtin`). Raises FlextronError when two
    paths would be one domain, when a domain's name cannot be part of a file name, and on anything else.
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
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write prepared data into the empty directory `out`.

    inputs: domain -> paths (see `parse_inputs`). tokenizer: a Hugging Face tokenizer directory; None trains a byte-level BPE of
    `vocab_size` tokens on the training text. valid_fraction: share of the text of every domain to hold out. progress: called
    with a status line now and then.

    Writes DOMAIN_{train,valid}.{bin,idx}, tokenizer/ and, last, data.json. Returns the contents of data.json's `domains`, each
    with `bytes_per_token`, and `vocab_size`, `eod`, `ignored_files` and `skipped` ([place, reason] each).
    Raises FlextronError on bad input.
    """
    out = Path(out)
    say = progress or (lambda line: None)
    if not out.is_dir() or any(out.iterdir()):
        raise FlextronError(f"{out}: not an empty directory to write the prepared data into")
    if not 0 < valid_fraction <= 0.5:
        raise FlextronError(f"valid_fraction={valid_fraction} must be above 0 and at most 0.5")
    tokens = open_tokenizer(tokenizer) if tokenizer is not None else None
    parts = []
    for domain, paths in inputs.items():
        say(f"reading {domain}")
        parts.append(_split(open_corpus(domain, paths, text_key, skip_bad), valid_fraction, seed))
    if tokens is None:
        say(f"training a byte-level tokenizer of {vocab_size} tokens")
        tokens = train_tokenizer(_sample(parts), vocab_size)
    tokens.save(out / "tokenizer")
    domains = {part.corpus.domain: _write_domain(part, tokens, out, say) for part in parts}
    table = {
        "version": DATA_VERSION,
        "tokenizer": "tokenizer",
        "vocab_size": tokens.vocab_size,
        "eod": tokens.eod,
        "domains": domains,
    }
    (out / DATA_FILE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    total = {name: d["train_tokens"] + d["valid_tokens"] for name, d in domains.items()}
    return {
        "vocab_size": tokens.vocab_size,
        "eod": tokens.eod,
        "domains": {name: {**d, "bytes_per_token": d["bytes"] / total[name]} for name, d in domains.items()},
        "ignored_files": sum(part.corpus.ignored for part in parts),
        "skipped": [[place, reason] for part in parts for place, reason in part.corpus.skipped.items()],
    }


@dataclass
class _Part:
    """A domain's documents, each in training or validation; at most one is cut, its last `cut_share` for validation."""

    corpus: Corpus
    draws: np.ndarray  # [documents], one number in [0, 1) from the seed and the text of each
    sizes: np.ndarray  # [documents], bytes
    valid: np.ndarray  # [documents], bool
    cut: int | None = None
    cut_share: float = 0.0

    def texts(self) -> Iterator[tuple[int, bool, str]]:
        """(document, whether it is for validation, text); the cut document comes twice."""
        for i, (text, valid) in enumerate(zip(self.corpus, self.valid, strict=True)):
            if i == self.cut:
                end = len(text) - max(1, round(len(text) * self.cut_share))
                yield i, False, text[:end]
                yield i, True, text[end:]
            else:
                yield i, bool(valid), text


def _split(corpus: Corpus, fraction: float, seed: int) -> _Part:
    """Deal the documents of a domain to training and validation.

    A document goes where a hash of the seed, the domain and its text says: the same side whatever is added, and copies of one
    document together. Where that misses the fraction by more than a factor of two (few documents, or one that outweighs the
    rest), validation takes documents in the order of their hashes while they fit; where none does, the end of the largest.
    """
    salt = f"{seed}/{corpus.domain}".encode()
    draws, sizes = array("d"), array("q")
    largest, letters = 0, 0  # the largest document and its number of characters
    for text in corpus:
        data = text.encode()
        if len(data) > (sizes[largest] if sizes else 0):
            largest, letters = len(sizes), len(text)
        digest = blake2b(data, digest_size=8, key=blake2b(salt, digest_size=16).digest())
        draws.append((int.from_bytes(digest.digest(), "big") >> 11) / (1 << 53))
        sizes.append(len(data))
    if not sizes:
        left_out = f" ({len(corpus.skipped)} left out as unreadable)" if corpus.skipped else ""
        raise FlextronError(f"domain '{corpus.domain}' has no document{left_out}")
    part = _Part(corpus, np.array(draws), np.array(sizes), np.array(draws) < fraction)
    wanted = fraction * part.sizes.sum()
    share = lambda: part.sizes[part.valid].sum() / wanted  # noqa: E731
    if 0.5 <= share() <= 2 and not part.valid.all():
        return part
    part.valid[:] = False
    held = 0
    for i in np.argsort(part.draws, kind="stable"):
        if held + part.sizes[i] <= wanted:
            part.valid[i] = True
            held += part.sizes[i]
    if share() >= 0.5:
        return part
    if letters < 2:
        raise FlextronError(
            f"domain '{corpus.domain}' is too small for validation text: {len(sizes)} document(s) of one character"
        )
    part.valid[:] = False
    part.cut, part.cut_share = largest, min(0.5, wanted / part.sizes[largest])
    return part


def _sample(parts: list[_Part]) -> Iterator[str]:
    """Training text for the tokenizer: evenly from every domain, spread over its documents, SAMPLE_BYTES at most."""
    for part in parts:
        left = SAMPLE_BYTES // len(parts)
        train = ~part.valid
        order = np.argsort(part.draws[train], kind="stable")
        last = min(np.searchsorted(np.cumsum(part.sizes[train][order]), left), len(order) - 1)
        threshold = part.draws[train][order][last]  # documents up to it hold what is wanted
        for i, valid, text in part.texts():
            if not valid and part.draws[i] <= threshold and left > 0:
                yield text[:left]
                left -= len(text)


def _write_domain(part: _Part, tokens: Tokenizer, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the token files of a domain; returns its entry in data.json."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    domain = part.corpus.domain
    names = {False: f"{domain}_train", True: f"{domain}_valid"}
    dtype = DType.optimal_dtype(tokens.vocab_size)
    builders = {valid: IndexedDatasetBuilder(str(out / f"{name}.bin"), dtype=dtype) for valid, name in names.items()}
    count = {False: 0, True: 0}
    for batch in groups(part.texts()):
        for (_, valid, _), ids in zip(batch, tokens.encode_batch([text for _, _, text in batch]), strict=True):
            builders[valid].add_item(torch.from_numpy(ids))
            builders[valid].end_document()
            count[valid] += len(ids)
        say(f"tokenizing {domain}: {batch[-1][0] + 1}/{len(part.sizes)} documents, {count[False] + count[True]} tokens")
    for valid, name in names.items():
        builders[valid].finalize(str(out / f"{name}.idx"))
    return {
        "train": names[False],
        "valid": names[True],
        "train_tokens": count[False],
        "valid_tokens": count[True],
        "documents": len(part.sizes),
        "bytes": int(part.sizes.sum()),
    }


def _paths(value: object, name: str) -> list[str]:
    values = [value] if isinstance(value, str | os.PathLike) else value
    if (
        not isinstance(values, Sequence)
        or not all(isinstance(v, str | os.PathLike) and str(v) for v in values)
        or not len(values)
    ):
        raise FlextronError(f"{name}: a path or a list of paths is needed, not {value!r}")
    return [str(v) for v in values]


def _stem(path: str) -> str:
    name = Path(os.path.abspath(Path(path).expanduser())).name
    if name.lower().endswith(JSONL_SUFFIXES):
        return re.sub(r"\.jsonl(\.gz)?$", "", name, flags=re.IGNORECASE)
    return name if Path(path).expanduser().is_dir() else Path(name).stem


def _check_domain(name: object, path: str | None = None) -> str:
    if not isinstance(name, str) or not _DOMAIN_NAME.fullmatch(name):
        of = f"'{path}': name it, input={{NAME: PATH}}" if path else "input"
        raise FlextronError(f"domain name {name!r} is not letters, digits and . _ + - (it names files); from {of}")
    return name
