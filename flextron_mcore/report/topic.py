"""A topic of the report: the stages it reads, and what it adds to the page. No torch import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flextron_mcore.report.drawing import Picture
from flextron_mcore.report.reader import Settings, StageOutput

R = TypeVar("R")
Column = tuple[str, Sequence[str]]  # head and cells


@dataclass(frozen=True)
class Table:
    """A table as text. The first `left` columns are aligned left, the others right; `strong` is the row to stress."""

    head: list[str]
    rows: list[list[str]]
    left: int = 1
    strong: int | None = None

    @classmethod
    def of_columns(cls, columns: Sequence[Column], left: int = 1, strong: int | None = None) -> Table:
        """A table from columns of equal length."""
        rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
        return cls([head for head, _ in columns], rows, left, strong)


@dataclass(frozen=True)
class Card:
    """One key figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: heading, one line of explanation, tables and pictures."""

    key: str
    title: str
    note: str
    tables: list[Table]
    pictures: list[Picture]
    beside: bool = False  # table and picture next to each other where there is room


@dataclass(frozen=True)
class Progress:
    """One training stage: a sentence for the summary and a key figure. `elastic` training has precedence over other stages."""

    sentence: str
    card: Card
    elastic: bool


@dataclass(frozen=True)
class Highlights:
    """Contribution of a topic to the head of the page, to its settings, and to family.json.

    sentences, cards: of evaluated networks; where no topic has cards, the summary tells of the training stages (`progress`).
    settings: the most telling first. details: more settings, as a title and rows of (name, value). values: keys of family.json.
    """

    sentences: list[str] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    settings: list[Settings] = field(default_factory=list)
    details: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Topic(Generic[R]):
    """A topic of the page. A registry of the report is a sequence of topics, in the order of the page.

    stages: names of the stages it reads. read: the result of one stage directory; None where another topic shows it. sections:
    the parts of the page for at least one result. highlights: for any number of results, also none.
    """

    stages: tuple[str, ...]
    read: Callable[[StageOutput], R | None]
    sections: Callable[[list[R]], list[Section]]
    highlights: Callable[[list[R]], Highlights] = lambda results: Highlights()

    def results(self, outputs: Sequence[StageOutput]) -> list[R]:
        """The results of all stage directories that the topic reads."""
        found = [self.read(output) for output in outputs if output.kind in self.stages]
        return [result for result in found if result is not None]


def numbered(results: Sequence[R]) -> Iterator[tuple[R, str, str]]:
    """Each result with the end of its sections' keys (empty, 2, 3, ...) and of their titles (its label, if there are several)."""
    for i, result in enumerate(results, start=1):
        yield result, str(i) if i > 1 else "", f" ({result.label})" if len(results) > 1 else ""
