"""Split of documents into training and validation text. Equal texts are split equally, in all domains."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from ..config import FlextronError

_WORD = re.compile(r"\S+")


@dataclass
class Documents:
    """Hash, size and divisibility of each document of a domain, in the order of the corpus.

    Attributes:
        domain: name of the domain.
        draws: float64 [documents], in [0, 1): hash of the seed and the text, equal for texts that differ in the amount of white
            space only.
        sizes: int64 [documents], bytes of the text in UTF-8.
        divisible: bool [documents], True for a text of at least two visible characters, which can be cut.
    """

    domain: str
    draws: np.ndarray
    sizes: np.ndarray
    divisible: np.ndarray

    @classmethod
    def of(cls, domain: str, texts: Iterable[str], seed: int) -> Documents:
        """Hash, size and divisibility of texts, which are read once.

        Args:
            domain: name of the domain.
            texts: documents, each with at least one visible character.
            seed: seed of the split.
        """
        draws, sizes, divisible = array("d"), array("q"), array("b")
        key = blake2b(str(seed).encode(), digest_size=16).digest()
        for text in texts:
            words = " ".join(text.split())
            digest = blake2b(words.encode(), digest_size=8, key=key).digest()
            draws.append((int.from_bytes(digest, "big") >> 11) / (1 << 53))
            sizes.append(len(text.encode()))
            divisible.append(len(words) > 1)
        return cls(domain, np.array(draws), np.array(sizes, dtype=np.int64), np.array(divisible, dtype=bool))


@dataclass
class _Texts:
    """Distinct texts of all domains, in ascending order of their draws.

    Attributes:
        draws: float64 [texts], as in Documents.
        share: float64 [texts], fraction of the text, counted from its end, that is validation text; NaN: not decided yet.
        members: for each domain, int64 [documents]: index of each document's text.
    """

    draws: np.ndarray
    share: np.ndarray
    members: list[np.ndarray] = field(default_factory=list)


def split(domains: Sequence[Documents], fraction: float) -> list[np.ndarray]:
    """Fraction of each document, counted from its end, that is validation text: 0, 1, or between for a document that is cut.

    A text with a draw below `fraction` is validation text, so that copies stay together and documents added later change
    nothing. If this misses a domain's fraction by more than a factor of two (few documents, or one that outweighs the rest), the
    texts are instead added to validation in the order of their draws while they fit. If too few fit, the largest text is cut. A
    text of an earlier domain is split as there, unless a later domain has to cut it: the cut then holds in all domains.

    Args:
        domains: documents of each domain, at least one each.
        fraction: wanted share of validation text in the text of every domain, in bytes.

    Returns:
        One float64 array [documents] for each domain.

    Raises:
        FlextronError: a domain needs a cut text, but none of its texts has two visible characters.
    """
    draws, places = np.unique(np.concatenate([part.draws for part in domains]), return_inverse=True)
    ends = np.cumsum([len(part.draws) for part in domains])[:-1]
    texts = _Texts(draws, np.full(len(draws), np.nan), np.split(places, ends))
    for part, members in zip(domains, texts.members, strict=True):
        _decide(part, members, texts, fraction)
    return [texts.share[members] for members in texts.members]


def _decide(part: Documents, members: np.ndarray, texts: _Texts, fraction: float) -> None:
    """Set `texts.share` for the texts of one domain. members: index of each document's text. Raises the error of `split`."""
    mine, local = np.unique(members, return_inverse=True)
    sizes = np.bincount(local, weights=part.sizes)  # bytes of a text together with its copies in this domain
    wanted = fraction * sizes.sum()
    share = texts.share[mine]
    free = np.isnan(share)
    share[free] = texts.draws[mine][free] < fraction
    held = (sizes * share).sum()
    if not 0.5 * wanted <= held <= 2 * wanted or share.min() == 1:
        share[free] = 0
        held = (sizes * share).sum()
        for i in np.flatnonzero(free):
            if held + sizes[i] <= wanted:
                share[i] = 1
                held += sizes[i]
        if held < 0.5 * wanted or share.min() == 1:
            divisible = np.zeros(len(mine), dtype=bool)
            divisible[local] = part.divisible
            candidates = np.where(divisible & (share == (share.min() == 1)), sizes, 0)
            largest = int(candidates.argmax())
            if not candidates[largest]:
                raise FlextronError(
                    f"domain '{part.domain}' is too small for validation text: {len(part.sizes)} document(s) of one character: "
                    "leave it out of input="
                )
            share[largest] = 0.5 if share[largest] else min(0.5, (wanted - held) / sizes[largest])
    texts.share[mine] = share


def pieces(text: str, share: float) -> Iterator[tuple[bool, str]]:
    """(True for validation text, text) of a document; two such pairs if the document is cut.

    The cut lies after a number of visible characters, so that copies with different white space are cut at the same one.
    share: fraction of the visible characters, counted from the end, that is validation text.
    """
    if share in (0, 1):
        yield bool(share), text
        return
    visible = sum(word.end() - word.start() for word in _WORD.finditer(text))
    first = visible - min(visible - 1, max(1, round(visible * share)))  # visible characters of the training part
    for word in _WORD.finditer(text):
        if first <= word.end() - word.start():
            yield False, text[: word.start() + first]
            yield True, text[word.start() + first :]
            return
        first -= word.end() - word.start()
