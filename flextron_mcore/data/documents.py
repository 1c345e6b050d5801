"""Held-out documents of prepared data, read at random places."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .blend import PreparedData
from .existing import bounds
from .index import read_index, with_suffix

_AGAIN = "run `flextron prepare` again"


@dataclass(frozen=True)
class Documents:
    """Validation documents of one domain.

    Attributes:
        tokens: all tokens of the domain's corpus, a file that is not read as a whole.
        starts: int64 [documents + 1], first token of each document, and the end of the last one.
    """

    tokens: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def piece(self, rng: np.random.Generator, length: int) -> tuple[int, np.ndarray, bool]:
        """Random piece of a document: (number of the document, ids [at most `length`], True if the piece begins the document).

        Every token of the domain is equally likely to be the first one.
        """
        place = int(rng.integers(self.starts[0], self.starts[-1]))
        document = int(np.searchsorted(self.starts, place, "right")) - 1
        return document, self.tokens[place : min(place + length, self.starts[document + 1])], place == self.starts[document]


def valid_documents(data: PreparedData) -> dict[str, Documents]:
    """{domain: its validation documents that have tokens}; domains without any are left out.

    Raises FlextronError for a token file that is missing or damaged.
    """
    found = {}
    for name, domain in data.domains.items():
        if not domain.valid:
            continue
        prefix = Path(domain.valid)
        index = read_index(prefix, _AGAIN)
        begin, end = bounds(data.split)["validation"] if data.split else (0.0, 1.0)
        first, last = (round(share * len(index.lengths)) for share in (begin, end))
        starts = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])[first : last + 1]
        starts = np.unique(starts)  # documents without tokens
        if len(starts) > 1:
            found[name] = Documents(np.memmap(with_suffix(prefix, ".bin"), dtype=index.dtype, mode="r"), starts)
    return found
