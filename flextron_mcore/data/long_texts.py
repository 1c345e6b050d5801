"""Tokenization of long texts in overlapping pieces, which limits memory and uses every core.

The result equals the token ids of the whole text. A tokenizer treats the ends of a text differently (a space in front,
stripping, a cut word), but this changes only tokens in the overlap of two pieces. Two pieces are joined within a run of tokens
that both contain at the same characters of the text.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
from tokenizers import Encoding, Tokenizer

PIECE = 1 << 20  # characters of a piece
OVERLAP = 1 << 13  # characters that two neighbouring pieces share on each side of their border
_RUN = 32  # length of the run of tokens that two neighbouring pieces must have in common
_AT_ONCE = 4  # pieces that are tokenized in parallel


def encode_long(backend: Tokenizer, text: str, piece: int = PIECE, overlap: int = OVERLAP) -> np.ndarray:
    """Token ids of a text, int64 [tokens], as if encoded at once, without special tokens at its ends (BOS, EOS).

    If two neighbouring pieces have no run of tokens in common, the whole text is tokenized at once.

    Args:
        backend: tokenizer of the package tokenizers.
        text: text of any length.
        piece: characters of a piece.
        overlap: characters that two neighbouring pieces share on each side of their border.
    """
    borders = list(range(piece, len(text), piece))
    ranges = iter(zip([0, *borders], [*borders, len(text)], strict=True))
    parts: list[np.ndarray] = []
    last: np.ndarray | None = None  # tokens of the last piece that are not in `parts` yet
    while batch := list(islice(ranges, _AT_ONCE)):
        starts = [max(0, start - overlap) for start, _ in batch]
        encoded = backend.encode_batch(
            [text[start : end + overlap] for start, (_, end) in zip(starts, batch, strict=True)], add_special_tokens=False
        )
        for place, encoding, (border, _) in zip(starts, encoded, batch, strict=True):
            found = _rows(encoding, place)
            if last is not None:
                joint = _joint(last, found, border, overlap // 2)
                if joint is None:  # for example, one word of a million letters
                    return np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)
                parts.append(last[: joint[0], 0])
                found = found[joint[1] :]
            last = found
    return np.concatenate([*parts, last[:, 0]] if last is not None else [np.empty(0, dtype=np.int64)])


def _rows(encoding: Encoding, start: int) -> np.ndarray:
    """(id, first character, last character + 1) of each token, int64 [tokens, 3]. start: the piece's offset in the text."""
    ids = np.array(encoding.ids, dtype=np.int64)
    return np.column_stack([ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start])


def _joint(left: np.ndarray, right: np.ndarray, border: int, reach: int) -> tuple[int, int] | None:
    """(tokens to keep of the left piece, index of the right piece's first token to keep); None without a common run.

    Args:
        left, right: tokens of two neighbouring pieces, from `_rows` [tokens, 3].
        border: offset in the text of the border between the pieces.
        reach: largest distance of the run from the border, in characters.
    """
    windows = []
    for rows in (left, right):
        inside = np.flatnonzero((rows[:, 1] >= border - reach) & (rows[:, 2] <= border + reach))
        windows.append((inside[0], inside[-1] + 1) if len(inside) else (0, 0))
    (first, end), (begin, stop) = windows
    places = {tuple(row): first + i for i, row in enumerate(left[first:end].tolist())}
    for j in range(begin, stop - _RUN + 1):
        i = places.get(tuple(right[j].tolist()))
        if i is not None and i + _RUN <= end and np.array_equal(left[i : i + _RUN], right[j : j + _RUN]):
            return i + _RUN // 2, j + _RUN // 2
    return None
