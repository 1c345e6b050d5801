"""Choices token by token, with the work really saved: what each level adds is a product of its own, for the tokens that have it.

Sub-networks are nested, so level k has the units of level k - 1 and some more. These are computed for the tokens of level k or
higher: K dense products with no padding and no masks, in which every weight is read once. Sorted by falling level, these tokens
are the first ones. Levels count a block's candidates from 0, the smallest; a token of level -1 (padding) takes part in nothing.

Shape suffixes: S sequence, B batch, N tokens (S*B), n tokens that take part, K candidates, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

KV_POLICIES = ("full", "own")


class BlockRouting(Protocol):
    """Chooses for the tokens of one block.

    kv_policy: in attention with whole KV groups as units, `full` lets every token write all keys and values, and `own` only those
    of the groups that it uses: a group's attention is then causal attention among the tokens that use it. masked: compute
    everything and multiply what is not chosen with zero, so that a gradient tells what each level would have changed.
    """

    kv_policy: str
    masked: bool

    def levels(self, hidden_SBC: Tensor, sequence_parallel: bool) -> Tensor:
        """Levels [S, B] of the whole sequence, equal on all tensor-parallel ranks; hidden: this rank's input of the block."""

    def masks(self, levels_SB: Tensor) -> Tensor:
        """[S, B, K]: 1 where a token's level is at least k; a leaf that keeps its gradient while it is wanted."""


@dataclass(frozen=True)
class Given:
    """What each of several products is for: its rows [n] among the N tokens, each at most once, or None for all of them."""

    rows: Sequence[Tensor | None]

    def take(self, x_NX: Tensor) -> list[Tensor]:
        """For each product its tokens [n, ...]."""
        return [take_rows(x_NX, rows) for rows in self.rows]


@dataclass(frozen=True)
class Leading:
    """The same where each is for the first `counts` of the tokens `order` (None: of all, as they lie); counts fall."""

    order: Tensor | None
    counts: Sequence[int]

    def take(self, x_NX: Tensor) -> list[Tensor]:
        """For each product its tokens [n, ...]."""
        ordered = take_rows(x_NX, self.order)
        return [ordered[:count] for count in self.counts]

    def add(self, parts_nX: Sequence[Tensor], count: int) -> Tensor:
        """[N, ...], of `count` tokens: each the sum over the products that it is in."""
        summed = parts_nX[0] if len(parts_nX) == 1 else _AddLeading.apply(*parts_nX)
        return put_rows(summed, self.order, count)


@dataclass(frozen=True)
class Step:
    """What levels `first` to `last` add to those below, for the first `count` tokens."""

    first: int
    last: int
    count: int


def by_level(levels_SB: Tensor, count: int) -> tuple[Tensor | None, list[Step]]:
    """The tokens that take part by falling level (None: all of them, as they lie), and the steps up to the highest that occurs.

    Of `count` levels; those that the same tokens have are one step. Where no token takes part, it is one for none. Waits for the
    device, once.
    """
    flat_N = levels_SB.flatten()
    taking_K = (flat_N >= _numbers(count, flat_N)[:, None]).sum(1)
    order_N = falling(flat_N) if on_gpu(flat_N) else None  # a GPU has something to do while this waits for it
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


def on_gpu(x: Tensor) -> bool:
    """Whether what waits is dear, and products for nothing are cheaper than masks and sums over rows."""
    return x.is_cuda


def _numbers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


@dataclass(frozen=True)
class Participants:
    """The tokens of each sequence that take part in something, in order of position.

    index_nB: their positions in the sequence, for n the most that any sequence has; shorter ones are filled up with others.
    valid_nB: which are no filling. rows: the same as indices [n*B] among the tokens, None where all take part. count: how many
    take part.
    """

    index_nB: Tensor
    valid_nB: Tensor
    rows: Tensor | None
    count: int

    @classmethod
    def by_level(cls, levels_SB: Tensor, count: int) -> list[Participants | None]:
        """For each of `count` levels the tokens of that level or a higher one; None where there are none.

        The same object for levels that the same tokens have. Waits for the device, once.
        """
        taken_KSB = levels_SB >= _numbers(count, levels_SB)[:, None, None]
        counts_KB = taken_KSB.sum(1)
        every = _in_order(taken_KSB, counts_KB) if on_gpu(taken_KSB) else None  # as in the function `by_level`
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
        """Values [count, ...] of those that take part, as they come in `order` (None: as they lie), an order of all tokens."""
        flat = values_nBX.flatten(0, 1)
        if order_N is None or self.rows is None:
            return take_rows(flat, order_N)
        place_N = torch.empty_like(order_N).scatter_(0, self.rows, _numbers(len(self.rows), self.rows))
        return take_rows(flat, place_N[order_N[: self.count]])


def _in_order(taken_XSB: Tensor, counts_XB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sequence those that are taken, and then the others: where in it, which are taken, and where among all tokens."""
    length, batch = taken_XSB.shape[-2:]
    index_XSB = taken_XSB.logical_not().to(torch.uint8).argsort(dim=-2, stable=True)
    valid_XSB = _numbers(length, taken_XSB)[:, None] < counts_XB.unsqueeze(-2)
    return index_XSB, valid_XSB, index_XSB * batch + _numbers(batch, taken_XSB)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NX: Tensor, rows: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows)
        ctx.count = len(x_NX)
        return x_NX.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad_nX: Tensor):  # type: ignore[override]
        return put_rows(grad_nX, *ctx.saved_tensors, ctx.count), None


class _PutRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_nX: Tensor, rows: Tensor, count: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows)
        return _put_rows(x_nX, rows, count)

    @staticmethod
    def backward(ctx, grad_NX: Tensor):  # type: ignore[override]
        return take_rows(grad_NX, *ctx.saved_tensors), None, None


def take_rows(x_NX: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of a tensor, each at most once (its gradient is copied, not added up); None: all of them."""
    if rows is None:
        return x_NX
    return _TakeRows.apply(x_NX, rows) if torch.is_grad_enabled() else x_NX.index_select(0, rows)


def put_rows(x_nX: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """[count, ...]: what `take_rows` takes x from, and zeros elsewhere."""
    if rows is None:
        return x_nX
    return _PutRows.apply(x_nX, rows, count) if torch.is_grad_enabled() else _put_rows(x_nX, rows, count)


def _put_rows(x_nX: Tensor, rows: Tensor, count: int) -> Tensor:
    if len(rows) < count:
        return x_nX.new_zeros(count, *x_nX.shape[1:]).index_copy_(0, rows, x_nX)
    place_N = torch.empty_like(rows).scatter_(0, rows, torch.arange(count, device=rows.device))
    return x_nX.index_select(0, place_N)  # faster than index_copy_


class _AddLeading(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *parts_nX: Tensor) -> Tensor:  # type: ignore[override]
        ctx.counts = [len(part) for part in parts_nX]
        out_nX = parts_nX[0].clone()
        for part in parts_nX[1:]:
            out_nX[: len(part)].add_(part)
        return out_nX

    @staticmethod
    def backward(ctx, grad_nX: Tensor):  # type: ignore[override]
        return tuple(grad_nX[:count] for count in ctx.counts)
