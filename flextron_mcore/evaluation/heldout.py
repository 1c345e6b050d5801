"""Tasks made from held-out text: last word, choice of a continuation, minimal pairs.

A task is a list of rows and a configuration of lm-evaluation-harness, which scores it. Both can be written to files, from which
`lm_eval --include_path` runs the same task.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData
from flextron_mcore.data.documents import Documents, valid_documents
from flextron_mcore.data.tokenizer import Tokenizer

MOST_ROWS = 1000
CHOICES = 4
_DRAWS = 40  # passages that are drawn for a row before there are too few
_TOKENS_OF_A_WORD = 8
_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_CHOICE = {"output_type": "multiple_choice", "doc_to_target": "label", "doc_to_choice": "choices", "target_delimiter": ""}
Row = dict[str, Any]


@dataclass(frozen=True)
class Passage:
    """Words of a document with the white space between them.

    Attributes:
        domain, document: name of the domain and number of the document that it is from.
        words: words, without white space.
        gaps: white space in front of each word but the first.
    """

    domain: str
    document: int
    words: list[str]
    gaps: list[str]

    def text(self, first: int = 0, last: int | None = None) -> str:
        """Text of the words `first` to `last` (exclusive; None: all), without white space around it."""
        last = len(self.words) if last is None else last
        return self.words[first] + "".join(self.gaps[i - 1] + self.words[i] for i in range(first + 1, last))


@dataclass(frozen=True)
class Sizes:
    """Sizes of passages, in words, for a model of some number of positions.

    Attributes:
        passage: words of a whole passage.
        continuation: words at its end that are a continuation.
        pair: words of each half of a minimal pair.
    """

    passage: int
    continuation: int
    pair: int

    @classmethod
    def of(cls, positions: int) -> Sizes:
        """Sizes for a model of `positions` positions: passages of a sixth of them in words, at least 6 and at most 64."""
        passage = min(64, max(6, positions // 6))
        return cls(passage, max(2, passage // 4), min(10, passage))


class Source:
    """Random passages of held-out documents.

    Args:
        data: prepared data.
        tokenizer: its tokenizer.
        positions: positions of the model, which a row's tokens may not exceed.
        seed: seed of the draws.
    """

    def __init__(self, data: PreparedData, tokenizer: Tokenizer, positions: int, seed: int) -> None:
        self.documents: dict[str, Documents] = valid_documents(data)
        self.tokenizer, self.positions, self.path = tokenizer, positions, data.path
        self.rng = np.random.default_rng([seed, 28])

    @property
    def total(self) -> int:
        """Number of documents of all domains."""
        return sum(map(len, self.documents.values()))

    def passage(self, words: int, domains: Sequence[str]) -> Passage | None:
        """Random passage of `words` words from one of `domains`, all equally likely; None if the drawn document ends before."""
        domain = domains[int(self.rng.integers(len(domains)))]
        document, ids, whole = self.documents[domain].piece(self.rng, (words + 2) * _TOKENS_OF_A_WORD)
        special = {*self.tokenizer.prefix, *self.tokenizer.suffix, self.tokenizer.eod}
        ends = [place for place, i in enumerate(ids.tolist()) if place and i in special]
        text = self.tokenizer.decode([i for i in ids[: min(ends, default=len(ids))] if i not in special])
        found = list(re.finditer(r"\S+", text))
        if not whole:
            found = found[1:]  # perhaps the end of a word
        found = found[: words if ends else min(words, len(found) - 1)]  # the last one may be cut
        if len(found) < words:
            return None
        gaps = [text[a.end() : b.start()] for a, b in zip(found, found[1:], strict=False)]
        return Passage(domain, document, [word.group() for word in found], gaps)

    def fits(self, *texts: str) -> bool:
        """True if each text, with a token in front of it, has no more tokens than the model has positions."""
        return all(len(ids) < self.positions for ids in self.tokenizer.encode_prompts(texts))


def last_word(source: Source, sizes: Sizes) -> Row | None:
    """Row of `heldout_last_word` from a random passage: a context, and its last word; None if that is not a word of letters."""
    found = source.passage(sizes.passage, list(source.documents))
    if found is None or found.gaps[-1] != " " or not (word := re.match(r"([^\W\d_]{2,})\W*$", found.words[-1])):
        return None
    row = {"context": found.text(0, sizes.passage - 1), "target": " " + word[1]}
    return row if source.fits(row["context"] + row["target"]) else None


def continuation(source: Source, sizes: Sizes) -> Row | None:
    """Row of `heldout_continuation` from a random passage: a context, its continuation and three of other documents.

    None if the passage does not suit, or too few other continuations are found.
    """
    found = source.passage(sizes.passage, list(source.documents))
    first = sizes.passage - sizes.continuation
    if found is None or found.gaps[first - 1] != " ":
        return None
    choices = [found.text(first)]
    near = [found.domain] if len(source.documents[found.domain]) > 1 else list(source.documents)
    for _ in range(_DRAWS):
        other = source.passage(sizes.continuation, near)
        if other and (other.domain, other.document) != (found.domain, found.document) and other.text() not in choices:
            choices.append(other.text())
        if len(choices) == CHOICES:
            break
    context = found.text(0, first)
    if len(choices) < CHOICES or not source.fits(*(f"{context} {choice}" for choice in choices)):
        return None
    order = source.rng.permutation(CHOICES).tolist()
    return {"context": context, "choices": [f" {choices[i]}" for i in order], "label": order.index(0)}


def minimal_pair(source: Source, sizes: Sizes) -> Row | None:
    """Row of `heldout_minimal_pairs` from a random passage: its words, and the same words with two neighbours swapped.

    None if the passage does not suit: it spans two lines, or has no two neighbours to swap.
    """
    found = source.passage(sizes.pair, list(source.documents))
    if found is None or set(found.gaps) != {" "}:
        return None
    words = found.words
    # Not the first and the last word, which a capital letter or a full stop may give away.
    places = [i for i in range(1, len(words) - 2) if words[i].isalpha() and words[i + 1].isalpha()]
    places = [i for i in places if words[i].lower() != words[i + 1].lower()]
    if not places:
        return None
    i = places[int(source.rng.integers(len(places)))]
    swapped = [*words[:i], words[i + 1], words[i], *words[i + 2 :]]
    label = int(source.rng.integers(2))
    choices = [" ".join(swapped)] * 2
    choices[label] = " ".join(words)
    return {"context": "", "choices": choices, "label": label} if source.fits(*choices) else None


@dataclass(frozen=True)
class Kind:
    """Kind of task made from held-out text.

    Attributes:
        row: function that makes a row from a drawn passage, or None if the passage does not suit.
        config: entries of its configuration for lm-evaluation-harness, beside those that all kinds have.
        needs: what the text must have to yield rows, for messages.
    """

    row: Callable[[Source, Sizes], Row | None]
    config: Mapping[str, Any]
    needs: str


_PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
_NORMALISED = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
KINDS = {
    "heldout_last_word": Kind(
        last_word,
        {"output_type": "loglikelihood", "doc_to_target": "target", "metric_list": [_PERPLEXITY, _ACCURACY]},
        "passages that end in a word of letters",
    ),
    "heldout_continuation": Kind(
        continuation, {**_CHOICE, "metric_list": [_ACCURACY, _NORMALISED]}, "at least two documents with passages of some words"
    ),
    "heldout_minimal_pairs": Kind(minimal_pair, {**_CHOICE, "metric_list": [_ACCURACY]}, "lines of several words of letters"),
}


@dataclass(frozen=True)
class HeldoutTask:
    """Task made from held-out text.

    Attributes:
        name: one of KINDS.
        rows: rows of the task, in random order.
    """

    name: str
    rows: list[Row]

    @property
    def config(self) -> dict[str, Any]:
        """Configuration for lm-evaluation-harness, without the data set."""
        common = {"task": self.name, "test_split": "test", "doc_to_text": "context", "num_fewshot": 0}
        return {**common, **KINDS[self.name].config, "metadata": {"version": 1.0}}

    def write(self, folder: Path, final: Path) -> None:
        """Write the task's rows as NAME.jsonl, and its configuration as NAME.yaml, which refers to the rows by their path.

        Args:
            folder: directory to write into.
            final: path that `folder` will have later, for the path in NAME.yaml.
        """
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        (folder / f"{self.name}.jsonl").write_text("".join(lines), encoding="utf-8")
        files = {"data_files": {"test": str(final / f"{self.name}.jsonl")}}
        config = {**self.config, "dataset_path": "json", "dataset_kwargs": files}
        text = yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, allow_unicode=True)
        (folder / f"{self.name}.yaml").write_text(text, encoding="utf-8")


def make(names: Sequence[str], data: PreparedData, tokenizer: Tokenizer, positions: int, seed: int) -> list[HeldoutTask]:
    """Make tasks of held-out text, each of at most MOST_ROWS rows. Equal arguments give equal tasks.

    Raises FlextronError for a name whose rows the text does not yield.

    Args:
        names: names of KINDS.
        data: prepared data, whose validation split is used.
        tokenizer: its tokenizer.
        positions: positions of the model, which a row's tokens may not exceed.
        seed: seed of the draws.
    """
    found, sizes = [], Sizes.of(positions)
    for name in names:
        source, rows = Source(data, tokenizer, positions, seed), {}
        kind, draws = KINDS[name], 0
        enough = source.total > (name == "heldout_continuation")
        while enough and len(rows) < MOST_ROWS and draws < _DRAWS * (len(rows) + _DRAWS):
            draws += 1
            if row := kind.row(source, sizes):
                rows.setdefault(json.dumps(row), row)
        if not rows:
            raise FlextronError(
                f"tasks: {name} needs {kind.needs}, which the {source.total} held-out document(s) of data={data.path} do not "
                "have: prepare more text, or leave the task out"
            )
        found.append(HeldoutTask(name, list(rows.values())))
    return found
