"""Description of existing Megatron corpora (.bin and .idx of Megatron-LM's preprocess_data.py) as prepared data, without a copy.

data.json then names the corpora by their absolute paths, with the split, a weight and a digest of each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import FlextronError
from ..digests import DATA_FILE
from ..files import expanded
from ..runtime.progress import Progress
from .index import Index, read_index, with_suffix
from .tokenizer import Tokenizer, open_tokenizer

DATA_VERSION = 1  # of data.json
PARTS = ("train", "validation")
_CHUNK = 1 << 24  # tokens that are checked at once
_SHOWN = 12  # tokens of the first document that the user sees as text
_ENDS = 1000  # documents whose last token is looked at
_MAKE = "name a corpus that Megatron-LM's tools/preprocess_data.py wrote, by its path without .bin and .idx"


@dataclass(frozen=True)
class Blend:
    """Corpora of a list as NeMo and Megatron-LM write it.

    Attributes:
        prefixes: paths without .bin and .idx.
        weights: weight of each prefix; None: by the number of tokens.
    """

    prefixes: list[str]
    weights: list[float] | None


def parse_paths(value: str | Sequence | Mapping) -> dict[str, Blend]:
    """{"all": blend} of a list of paths, or {"train": blend, "validation": blend} of a mapping.

    Raises FlextronError for other keys of a mapping, for a list that is neither [weight, prefix, ...] nor [prefix, ...], for a
    weight that is not a number of at least 0, for weights of validation, and for a prefix that is named twice.
    """
    if not isinstance(value, Mapping):
        return {"all": _blend(value, "paths")}
    if sorted(value) != sorted(PARTS):
        raise FlextronError(
            f"paths: has the keys {', '.join(map(str, value))}: write {{train: [...], validation: [...]}}, or a list"
        )
    blends = {part: _blend(value[part], f"paths.{part}") for part in PARTS}
    if blends["validation"].weights:
        raise FlextronError("paths.validation: has weights, but every corpus is validated on its own: leave the weights out")
    return blends


def describe(
    blends: Mapping[str, Blend], split: str | Sequence[float], tokenizer: str | Path, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write tokenizer/ and data.json for existing corpora, and return the figures of `prepare` for metrics.json.

    Every token is read once, to find ids that the tokenizer does not have.

    Args:
        blends: from `parse_paths`.
        split: shares of training, validation and test documents of a list of paths, as Megatron's --split.
        tokenizer: directory of the Hugging Face tokenizer that the corpora were made with.
        out: existing, empty directory to write into.
        say: function that is called with status lines.

    Raises:
        FlextronError: a file is missing, damaged or not a Megatron corpus, a token id is not the tokenizer's, or a part is empty.
    """
    tokens = open_tokenizer(tokenizer)
    halves = None if "all" not in blends else bounds(split)
    names = _names(list(dict.fromkeys(prefix for blend in blends.values() for prefix in blend.prefixes)))
    domains = {name: _domain(prefix, blends, halves, tokens, Path(tokenizer), say) for prefix, name in names.items()}
    for key, part in (("train_tokens", "training"), ("valid_tokens", "validation")):
        if not any(domain[key] for domain in domains.values()):
            raise FlextronError(f"paths, split: leave no document for {part}: give it a larger share, such as split=[90,10,0]")
    trained = blends["all" if halves else "train"]
    for prefix, weight in zip(trained.prefixes, trained.weights or (), strict=bool(trained.weights)):
        domains[names[prefix]]["weight"] = weight
    tokens.save(out / "tokenizer")
    table = {
        "version": DATA_VERSION,
        "tokenizer": "tokenizer",
        "vocab_size": tokens.vocab_size,
        "eod": tokens.eod,
        "split": split_text(split) if halves else None,
        "domains": domains,
    }
    (out / DATA_FILE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return {"vocab_size": tokens.vocab_size, "eod": tokens.eod, "domains": domains}


def split_text(split: str | Sequence) -> str:
    """Split as Megatron's text of three numbers. Raises FlextronError unless it is one to three numbers of at least 0."""
    items = split.split(",") if isinstance(split, str) else list(split)
    numbers = [_number(item) for item in items]
    if not 1 <= len(numbers) <= 3 or not all(n is not None for n in numbers) or not sum(numbers) > 0:
        shown = split if isinstance(split, str) else f"[{','.join(map(str, split))}]"
        raise FlextronError(f"split={shown}: must be the shares of training, validation and test documents, such as 99,1,0")
    return ",".join(map(repr, numbers + [0.0] * (3 - len(numbers))))


def bounds(split: str | Sequence) -> dict[str, tuple[float, float]]:
    """{"train", "validation": (begin, end) as shares of a corpus's documents}, as Megatron-Core cuts a corpus."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split_text(split)))
    return {part: each or (0.0, 0.0) for part, each in zip(PARTS, matrix, strict=False)}


def _domain(
    prefix: str,
    blends: Mapping[str, Blend],
    halves: Mapping[str, tuple[float, float]] | None,
    tokens: Tokenizer,
    tokenizer: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Entry of a corpus in data.json, after a check of its index and of its tokens.

    Args:
        prefix: path without .bin and .idx.
        blends: from `parse_paths`.
        halves: from `bounds`; None: the whole corpus belongs to the lists that name it.
        tokens: tokenizer of the corpus.
        tokenizer: its directory, for messages.
        say: function that is called with status lines.
    """
    index = read_index(Path(prefix), _MAKE)
    _check_ids(prefix, index, tokens, tokenizer)
    held = dict.fromkeys(PARTS, 0)
    for part in PARTS:
        begin, end = halves[part] if halves else (0.0, float(prefix in blends[part].prefixes))
        begin, end = (round(share * len(index.lengths)) for share in (begin, end))
        held[part] = int(index.lengths[begin:end].sum(dtype=np.int64))
    say(_first_text(prefix, index, tokens))
    return {
        "train": prefix if held["train"] else None,
        "valid": prefix if held["validation"] else None,
        "train_tokens": held["train"],
        "valid_tokens": held["validation"],
        "documents": len(index.lengths),
        "bytes": None,
        "weight": held["train"],
        "digest": index.digest.hex(),
    }


def _check_ids(prefix: str, index: Index, tokens: Tokenizer, tokenizer: Path) -> None:
    """Read all tokens of a corpus. Raises FlextronError for an id that the tokenizer does not have.

    Args:
        prefix: path without .bin and .idx.
        index: index of the corpus.
        tokens: tokenizer of the corpus.
        tokenizer: its directory, for the message.
    """
    ids = np.memmap(with_suffix(Path(prefix), ".bin"), dtype=index.dtype, mode="r") if index.lengths.any() else np.empty(0)
    with Progress(total=ids.nbytes, desc=f"prepare: checking {prefix}", unit="B", unit_scale=True, leave=False) as bar:
        for start in range(0, len(ids), _CHUNK):
            part = ids[start : start + _CHUNK]
            for found in (int(part.max()), int(part.min())):
                if not 0 <= found < tokens.vocab_size:
                    raise FlextronError(
                        f"{prefix}.bin: has the token id {found}, but tokenizer={tokenizer} has the ids 0 to "
                        f"{tokens.vocab_size - 1}: name the tokenizer that the corpus was made with"
                    )
            bar.update(part.nbytes)


def _first_text(prefix: str, index: Index, tokens: Tokenizer) -> str:
    """Line for the user on whether corpus and tokenizer belong together: first text, and number of documents that end in EOD.

    Args:
        prefix: path without .bin and .idx.
        index: index of the corpus.
        tokens: tokenizer that decodes the text.
    """
    ids = np.memmap(with_suffix(Path(prefix), ".bin"), dtype=index.dtype, mode="r") if index.lengths.any() else np.empty(0, int)
    ends = np.cumsum(index.lengths[:_ENDS], dtype=np.int64)[index.lengths[:_ENDS] > 0] - 1
    share = float((ids[ends] == tokens.eod).mean()) if len(ends) else 0.0
    text = tokens.decode(ids[:_SHOWN].tolist())
    line = f"{prefix}: begins with {text!r}; {share:.0%} of its first documents end with the tokenizer's end-of-text token"
    return line if share > 0.5 else f"warning: {line}: another tokenizer, or made without --append-eod"


def _blend(value: object, name: str) -> Blend:
    """Blend of a list of paths, or of one path. name: key for the message. Raises FlextronError for another value."""
    items = [value] if isinstance(value, str) else value
    form = f"{name}: must be [weight, prefix, weight, prefix, ...] or [prefix, prefix, ...]"
    if not isinstance(items, Sequence) or not items:
        raise FlextronError(form)
    numbers = [_number(item) for item in items]
    weights = None
    if any(number is not None for number in numbers):
        weights, items = numbers[::2], items[1::2]
        if len(weights) != len(items) or None in weights or any(number is not None for number in numbers[1::2]):
            raise FlextronError(f"{form}, with as many weights as prefixes, each a number of at least 0")
        if not sum(weights) > 0:
            raise FlextronError(f"{name}: has no weight above 0: give one to a corpus")
    if not all(isinstance(item, str) and item.strip() for item in items):
        raise FlextronError(form)
    prefixes = [str(expanded(item.strip()).resolve()) for item in items]
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise FlextronError(f"{name}: names {prefix} twice: name it once, with the sum of the weights")
        if Path(prefix).suffix in (".bin", ".idx") and Path(prefix).is_file():
            raise FlextronError(f"{name}: {prefix}: write the path without {Path(prefix).suffix}")
    return Blend(prefixes, weights)


def _number(item: object) -> float | None:
    """Number of at least 0 that an item is or spells; None for anything else."""
    try:
        number = float(item) if isinstance(item, str | int | float) and not isinstance(item, bool) else math.nan
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None


def _names(prefixes: Sequence[str]) -> dict[str, str]:
    """{prefix: name of the domain}: the last parts of the path, as many as make the names differ."""
    parts = [Path(prefix).parts for prefix in prefixes]
    length = 1
    while len({each[-length:] for each in parts}) < len(parts):
        length += 1
    return {prefix: "/".join(each[-length:]).lstrip("/") for prefix, each in zip(prefixes, parts, strict=True)}
