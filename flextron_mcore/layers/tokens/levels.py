"""Tokens by level: which tokens each level's part of a block is computed for.

Sub-networks are nested: level k has the units of level k - 1 and some more. These are computed for the tokens of level k or
higher: K dense products without padding and masks, in which every weight is read once. Levels count a block's candidates from
0, the smallest; a token of level -1 (padding) takes part in nothing.

Shape suffixes: S sequence, B batch, N tokens (S*B), n tokens that take part, K candidates, X anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from flextron_mcore.layers.rows import take_rows


class BlockRouting(Protocol):
    """Levels of the tokens of one block.

    kv_policy: in attention with whole KV groups as units, `full` lets every token write all keys and values, and `own` only those
    of the groups that it uses: a group's attention is then causal attention among the tokens that use it. masked: compute
    everything and multiply what is not chosen with zero, so that a gradient tells how each level would have changed the loss.
    """

    kv_policy: str
    masked: bool

    def levels(self, hidden_SBC: Tensor, sequence_parallel: bool) -> Tensor:
        """Levels [S, B] of the whole sequence, equal on all tensor-parallel ranks; hidden: this rank's input of the block."""

    def masks(self, levels_SB: Tensor) -> Tensor:
        """[S, B, K]: 1 where a token's level is at least k; a leaf that keeps its gradient while it is wanted."""


@dataclass(frozen=True)
class Step:
    """Units of levels `first` to `last`, which the first `count` tokens have in addition to those below."""

    first: int
    last: int
    count: int


def by_level(levels_SB: Tensor, count: int) -> tuple[Tensor | None, list[Step]]:
    """Tokens that take part, by falling level (None: all as they lie), and the steps up to the highest of `count` levels.

    Levels that the same tokens have are one step. Where no token takes part, there is one step for none. Waits for the device,
    once.
    """
    flat_N = levels_SB.flatten()
    taking_K = (flat_N >= _numbers(count, flat_N)[:, None]).sum(1)
    order_N = falling(flat_N) if waits_are_expensive(flat_N) else None  # work for the device during the wait
    taking = taking_K.tolist()
    if not taking[0]:
        return flat_N[:0], [Step(0, 0, 0)]
    found: list[Step] = []
    first = 0
    for level, (here, above) in enumerate(pairwise([*taking, 0])):
        if here > above:
            found.append(Step(first, level, here))
            first = level + 1
    if len(found) == 1 and taking[0] == len(flat_N):  # as when a single token is decoded
        return None, found
    return (falling(flat_N) if order_N is None else order_N)[: taking[0]], found


def falling(levels_N: Tensor) -> Tensor:
    """Tokens by falling level: [N]."""
    return levels_N.to(torch.int16).argsort(descending=True, stable=True)  # a GPU sorts by two bytes, not eight


def waits_are_expensive(x: Tensor) -> bool:
    """True on a GPU: host waits are expensive there, so a few useless rows are computed rather than counted."""
    return x.is_cuda


def _numbers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


@dataclass(frozen=True)
class Participants:
    """Tokens of each sequence that take part in something, in order of position.

    index_nB: their positions in the sequence, for n the most that any sequence has; shorter ones are filled up with others.
    valid_nB: False for filling. rows: as indices [n*B] among the tokens, None where all take part. count: how many take part.
    """

    index_nB: Tensor
    valid_nB: Tensor
    rows: Tensor | None
    count: int

    @classmethod
    def by_level(cls, levels_SB: Tensor, count: int) -> list[Participants | None]:
        """For each of `count` levels the tokens of that level or a higher one; None where there are none.

        One object for levels that the same tokens have. Waits for the device, once.
        """
        taken_KSB = levels_SB >= _numbers(count, levels_SB)[:, None, None]
        counts_KB = taken_KSB.sum(1)
        every = _in_order(taken_KSB, counts_KB) if waits_are_expensive(taken_KSB) else None  # as in the function `by_level`
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
        """Values [count, ...] of the participants, as they come in `order` (None: as they lie), an order of all tokens."""
        flat = values_nBX.flatten(0, 1)
        if order_N is None or self.rows is None:
            return take_rows(flat, order_N)
        place_N = torch.empty_like(order_N).scatter_(0, self.rows, _numbers(len(self.rows), self.rows))
        return take_rows(flat, place_N[order_N[: self.count]])


def _in_order(taken_XSB: Tensor, counts_XB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each sequence the taken tokens, then the others: positions in it, True for taken ones, indices among all tokens."""
    length, batch = taken_XSB.shape[-2:]
    index_XSB = taken_XSB.logical_not().to(torch.uint8).argsort(dim=-2, stable=True)
    valid_XSB = _numbers(length, taken_XSB)[:, None] < counts_XB.unsqueeze(-2)
    return index_XSB, valid_XSB, index_XSB * batch + _numbers(batch, taken_XSB)
