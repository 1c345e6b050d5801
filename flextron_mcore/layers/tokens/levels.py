"""Tokens sorted by level, so that a block with a width for every token is K dense products.

A level is the index of a block's candidate, 0 the smallest; -1 marks padding, which is not computed. Candidates are nested: level
k has the units of level k - 1 and more. The units that level k adds are computed for the tokens of level k or higher, their
participants, without padding or masks, and every weight is read once.

Shape suffixes: S sequence, B batch, N tokens (S*B), n participants, K candidates, X anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from flextron_mcore.layers.rows import take_rows


class BlockRouting(Protocol):
    """Token routing of one block (attention or MLP): a level for every token.

    A level is the index of a candidate width of the block, 0 the smallest; -1 marks padding.

    Attributes:
        kv_policy: `full`: every token writes keys and values of all KV groups. `own`: a token writes keys and values of the
            groups that it uses, and a group's attention is causal attention among the tokens that use it. If the attention's
            units are query heads, both are the same.
        masked: True: compute all units for all tokens and multiply unused ones with 0, so that every level gets a gradient.
    """

    kv_policy: str
    masked: bool

    def levels(self, hidden_SBC: Tensor, sequence_parallel: bool) -> Tensor:
        """Level of each token of the whole sequence [S, B]: index of its candidate, -1 for padding.

        All tensor-parallel ranks get the same levels.

        Args:
            hidden_SBC: input of the block on this rank.
            sequence_parallel: True if `hidden_SBC` has this rank's part of the sequence only.
        """

    def masks(self, levels_SB: Tensor) -> Tensor:
        """Masks [S, B, K]: 1 at k where a token's level is k or higher, so that it uses the units that level k adds, else 0.

        K is the largest number of candidates of any block. The result is a leaf tensor: routers learn from its gradient.
        """


@dataclass(frozen=True)
class Step:
    """Units of a block that are computed together, because the same tokens use them.

    Attributes:
        first, last: levels whose units these are: the units that levels `first` to `last` add to the levels below.
        count: number of tokens that use them: the first `count` tokens by decreasing level.
    """

    first: int
    last: int
    count: int


def by_level(levels_SB: Tensor, count: int) -> tuple[Tensor | None, list[Step]]:
    """Sort tokens by decreasing level, and group the levels into steps: (token indices [n], steps). Waits for the device once.

    A level is the index of a token's candidate in a block, 0 the smallest; -1 marks padding, which the indices leave out. A step
    is one or several neighbouring levels whose added units the same tokens use. Levels above the highest of any token are in no
    step. If all tokens have one level and none is padding, the indices are None: all tokens in their own order. If all tokens are
    padding, the indices are empty, and one step has no tokens.

    Args:
        levels_SB: level of each token.
        count: number of levels (candidates) of the block.
    """
    flat_N = levels_SB.flatten()
    taking_K = (flat_N >= _numbers(count, flat_N)[:, None]).sum(1)
    # Queued before the wait, so the device stays busy.
    order_N = decreasing_order(flat_N) if waits_are_expensive(flat_N) else None
    taking = taking_K.tolist()
    if not taking[0]:
        return flat_N[:0], [Step(0, 0, 0)]
    found: list[Step] = []
    first = 0
    for level, (here, above) in enumerate(pairwise([*taking, 0])):
        if here > above:
            found.append(Step(first, level, here))
            first = level + 1
    if len(found) == 1 and taking[0] == len(flat_N):  # one level for all, as when a single token is decoded
        return None, found
    return (decreasing_order(flat_N) if order_N is None else order_N)[: taking[0]], found


def decreasing_order(levels_N: Tensor) -> Tensor:
    """Token indices [N] by decreasing level; tokens of equal level keep their order."""
    return levels_N.to(torch.int16).argsort(descending=True, stable=True)  # a GPU's radix sort is faster on 2 bytes than on 8


def waits_are_expensive(x: Tensor) -> bool:
    """True on a GPU: host waits are expensive there, so a few useless rows are computed rather than counted."""
    return x.is_cuda


def _numbers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


@dataclass(frozen=True)
class Participants:
    """Participants of a level: the tokens of each sequence that use the units which the level adds, in order of position.

    Attributes:
        index_nB: position of each participant in its sequence. n is the largest number of participants of any sequence; other
            sequences are padded with tokens that are no participants.
        valid_nB: False for such padding.
        rows: indices [n*B] of the tokens of `index_nB` among all N tokens; None if all tokens are participants.
        count: number of participants of all sequences, without padding.
    """

    index_nB: Tensor
    valid_nB: Tensor
    rows: Tensor | None
    count: int

    @classmethod
    def by_level(cls, levels_SB: Tensor, count: int) -> list[Participants | None]:
        """Participants of each level: the tokens of that level or a higher one, None if there are none.

        Levels with the same participants share one object. Waits for the device once.

        Args:
            levels_SB: level of each token: index of its candidate, -1 for padding.
            count: number of levels.
        """
        taken_KSB = levels_SB >= _numbers(count, levels_SB)[:, None, None]
        counts_KB = taken_KSB.sum(1)
        every = _in_order(taken_KSB, counts_KB) if waits_are_expensive(taken_KSB) else None  # queued before the wait
        found: list[Participants | None] = []
        counts = counts_KB.tolist()
        for level, own in enumerate(counts):
            if not any(own):
                found.append(None)
            elif level and own == counts[level - 1]:
                found.append(found[-1])
            elif min(own) == len(levels_SB):
                index_SB = _numbers(len(levels_SB), levels_SB)[:, None].expand_as(levels_SB)
                found.append(cls(index_SB, taken_KSB[level], None, levels_SB.numel()))
            else:
                order = [x[level] for x in every] if every else _in_order(taken_KSB[level], counts_KB[level])
                index_nB, valid_nB, rows_nB = (x_SB[: max(own)] for x_SB in order)
                found.append(cls(index_nB, valid_nB, rows_nB.flatten(), sum(own)))
        return found

    def ordered(self, values_nBX: Tensor, order_N: Tensor | None) -> Tensor:
        """Values of the participants in the order of `order_N`, without padding: [n, B, ...] -> [count, ...].

        Args:
            values_nBX: values of the tokens of `index_nB`.
            order_N: permutation of all tokens that begins with the participants; None for the tokens' own order, if all tokens
                are participants.
        """
        flat = values_nBX.flatten(0, 1)
        if order_N is None or self.rows is None:
            return take_rows(flat, order_N)
        place_N = torch.empty_like(order_N).scatter_(0, self.rows, _numbers(len(self.rows), self.rows))
        return take_rows(flat, place_N[order_N[: self.count]])


def _in_order(taken_XSB: Tensor, counts_XB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort each sequence's tokens, taken ones first, each in order: (positions, True if taken, indices among all S*B tokens).

    The results are [..., S, B].

    Args:
        taken_XSB: True for tokens that are taken.
        counts_XB: number of taken tokens of each sequence.
    """
    length, batch = taken_XSB.shape[-2:]
    index_XSB = taken_XSB.logical_not().to(torch.uint8).argsort(dim=-2, stable=True)
    valid_XSB = _numbers(length, taken_XSB)[:, None] < counts_XB.unsqueeze(-2)
    return index_XSB, valid_XSB, index_XSB * batch + _numbers(batch, taken_XSB)
