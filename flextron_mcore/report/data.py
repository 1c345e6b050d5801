"""What a run starts from: the data sets of `prepare`, and the settings of an imported model. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from flextron_mcore.report.reader import StageOutput, read_settings
from flextron_mcore.report.text import memory
from flextron_mcore.report.topic import Highlights, Section, Table, Topic


@dataclass(frozen=True)
class Domain:
    """Sizes of one domain of a data set: tokens, documents and bytes of text."""

    name: str
    train_tokens: int
    valid_tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class Data:
    """One `prepare` directory."""

    label: str
    vocab_size: int
    domains: list[Domain]


def read(output: StageOutput) -> Data:
    """The data set of one `prepare` directory."""
    domains = output.metrics.inner("domains")
    found = [domains.inner(name).into(Domain, name=name) for name in domains.values]
    return output.metrics.into(Data, label=output.label, domains=found)


def sections(results: list[Data]) -> list[Section]:
    """Sizes of every domain, one table a data set."""
    return [Section("data", "Data", "Tokens, documents and size of every domain.", [_table(data) for data in results], [])]


def highlights(results: list[Data]) -> Highlights:
    """The tokenizer among the settings."""
    return Highlights(details=[(f"Tokenizer ({d.label})", [("vocab_size", f"{d.vocab_size:,}")]) for d in results])


def _table(data: Data) -> Table:
    unit, sizes = memory([domain.bytes for domain in data.domains])
    head = [f"Domain ({data.label})", "Training tokens", "Validation tokens", "Documents", f"Text ({unit})", "Bytes per token"]
    rows = []
    for domain, size in zip(data.domains, sizes, strict=True):
        tokens = domain.train_tokens + domain.valid_tokens
        counts = [f"{count:,}" for count in (domain.train_tokens, domain.valid_tokens, domain.documents)]
        rows.append([domain.name, *counts, size, f"{domain.bytes / tokens:.2f}" if tokens else "–"])
    return Table(head, rows)


TOPIC = Topic(("prepare",), read, sections, highlights)
IMPORTED = Topic(
    ("import",), lambda output: read_settings(output.metrics), lambda results: [], lambda results: Highlights(settings=results)
)
