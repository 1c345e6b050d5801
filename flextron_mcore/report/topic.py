"""Topic of the report: the stages that it reads, and the parts of the page that it makes of them. No torch import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from flextron_mcore.report.drawing import Picture
from flextron_mcore.report.reader import Settings, StageOutput

R = TypeVar("R")
Column = tuple[str, Sequence[str]]  # head and cells
Chapter = Literal["trained", "budgets", "evidence", "next"]
CHAPTERS: dict[Chapter, tuple[str, str]] = {  # in the order of the page: title and introduction
    "trained": (
        "What was trained",
        "Loss is in nats per token on validation text, perplexity is its exponential: lower is better.",
    ),
    "budgets": (
        "What each budget gives",
        "Every network is a part of the same weights. A budget is the share of the full model’s cost that a network may have.",
    ),
    "evidence": (
        "How sure that is",
        "The choices of the routers against those of other selectors and against chance, and the blocks that matter most.",
    ),
    "next": ("What to type next", ""),
}


@dataclass(frozen=True)
class Table:
    """Table of the page, as text.

    Attributes:
        head: header of each column.
        rows: cells of each row.
        left: number of columns, the first ones, that are aligned left; the others are aligned right.
        strong: index of the row to stress; None for none.
    """

    head: list[str]
    rows: list[list[str]]
    left: int = 1
    strong: int | None = None

    @classmethod
    def of_columns(cls, columns: Sequence[Column], left: int = 1, strong: int | None = None) -> Table:
        """Table from columns of equal length.

        Args:
            columns: (header, cells) of each column.
            left: number of columns aligned left.
            strong: index of the row to stress; None for none.
        """
        rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
        return cls([head for head, _ in columns], rows, left, strong)


@dataclass(frozen=True)
class Card:
    """Key figure at the head of the page: label, value as text, and a note below it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Section of a chapter of the page.

    Attributes:
        key: id of the section in the HTML.
        title: heading.
        note: explanation.
        tables, pictures: content.
        chapter: chapter of the page, a key of CHAPTERS.
        folded: True if the pictures are hidden until a click.
    """

    key: str
    title: str
    note: str
    tables: list[Table]
    pictures: list[Picture]
    chapter: Chapter = "evidence"
    folded: bool = False


@dataclass(frozen=True)
class Progress:
    """Summary of one training stage.

    Attributes:
        sentence: summary in words.
        card: key figure.
        elastic: True for elastic training; where there is one, key figures of other training stages are not shown.
    """

    sentence: str
    card: Card
    elastic: bool


@dataclass(frozen=True)
class Highlights:
    """Contribution of a topic to the head of the page, to its tables of settings, and to family.json.

    Attributes:
        sentences, cards: sentences and key figures of the summary, about evaluated networks.
        progress: summary of each training stage. Key figures of these follow `cards`; their sentences stand in the summary only
            if no topic has cards.
        settings: architecture and elastic space of the stages. The page takes each from the first that has it.
        details: tables of further settings, each (title, rows of (name, value)).
        values: {key of family.json: value}.
    """

    sentences: list[str] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    settings: list[Settings] = field(default_factory=list)
    details: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Topic(Generic[R]):
    """Topic of the page: the stages that it reads, and the sections that it makes of them.

    Attributes:
        stages: names of the stages that the topic reads.
        read: function (output of a stage) that returns its result, or None if another topic shows it.
        sections: function (one or more results) that returns sections of the page.
        highlights: function (results, possibly none) that returns their highlights; by default empty ones.
    """

    stages: tuple[str, ...]
    read: Callable[[StageOutput], R | None]
    sections: Callable[[list[R]], list[Section]]
    highlights: Callable[[list[R]], Highlights] = lambda results: Highlights()

    def results(self, outputs: Sequence[StageOutput]) -> list[R]:
        """Results of the outputs of the topic's stages, in their order, without those for which `read` returns None."""
        return [result for _, result in self.read_all(outputs)]

    def read_all(self, outputs: Sequence[StageOutput]) -> list[tuple[StageOutput, R]]:
        """(output, result) of each output of the topic's stages, without those for which `read` returns None."""
        found = [(output, self.read(output)) for output in outputs if output.kind in self.stages]
        return [(output, result) for output, result in found if result is not None]


def numbered(results: Sequence[R]) -> Iterator[tuple[R, str, str]]:
    """(result, end of its section's key, end of its section's title) of each of a topic's results.

    Keys end with nothing, "2", "3", ...; titles with " (LABEL)" if there are several results, else with nothing.
    """
    for i, result in enumerate(results, start=1):
        yield result, str(i) if i > 1 else "", f" ({result.label})" if len(results) > 1 else ""
