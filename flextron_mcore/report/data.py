"""Topics of `prepare` (sizes of data sets) and `import` (architecture of the imported model). No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from flextron_mcore.report.reader import Settings
from flextron_mcore.report.text import memory
from flextron_mcore.report.topic import Highlights, Section, Table, Topic


@dataclass(frozen=True)
class Domain:
    """Sizes of one domain of a data set that `flextron prepare` wrote: numbers of tokens and documents, bytes of text.

    bytes: None for an existing corpus, whose text is not known.
    """

    train_tokens: int
    valid_tokens: int
    documents: int
    bytes: int | None


@dataclass(frozen=True)
class Data:
    """Result of one directory that `flextron prepare` wrote.

    Attributes:
        label: name of the directory.
        vocab_size: number of tokens of the tokenizer's vocabulary.
        domains: {name: sizes of the domain}.
    """

    label: str
    vocab_size: int
    domains: dict[str, Domain]


def sections(results: list[Data]) -> list[Section]:
    """Section with a table for each data set: the sizes of its domains."""
    return [Section("data", "Data", "", [_table(data) for data in results], [], "trained")]


def highlights(results: list[Data]) -> Highlights:
    """Vocabulary size of each data set, for the tables of settings on the page."""
    return Highlights(details=[(f"Tokenizer ({d.label})", [("vocab_size", f"{d.vocab_size:,}")]) for d in results])


def _table(data: Data) -> Table:
    unit, sizes = memory([domain.bytes or 0 for domain in data.domains.values()])
    head = [f"Domain ({data.label})", "Training tokens", "Validation tokens", "Documents", f"Text ({unit})", "Bytes per token"]
    rows = []
    for (name, domain), size in zip(data.domains.items(), sizes, strict=True):
        tokens = domain.train_tokens + domain.valid_tokens
        counts = [f"{count:,}" for count in (domain.train_tokens, domain.valid_tokens, domain.documents)]
        known = domain.bytes is not None
        rows.append([name, *counts, size if known else "–", f"{domain.bytes / tokens:.2f}" if tokens and known else "–"])
    return Table(head, rows)


TOPIC = Topic(("prepare",), lambda output: output.into(Data), sections, highlights)
IMPORTED = Topic(
    ("import",), lambda output: output.metrics.into(Settings), lambda results: [], lambda results: Highlights(settings=results)
)
