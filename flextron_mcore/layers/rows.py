"""Rows of a matrix of tokens: which tokens each of several products is for, taken and put back.

Shape suffixes: N tokens, n of them for one product, X anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowIndex:
    """For each product its rows [n] among the N tokens, each at most once, or None for all of them."""

    rows: Sequence[Tensor | None]

    def take(self, x_NX: Tensor) -> list[Tensor]:
        """For each product its tokens [n, ...]."""
        return [take_rows(x_NX, rows) for rows in self.rows]


@dataclass(frozen=True)
class PrefixRows:
    """For each product the first of the tokens `order` (None: of all tokens as they lie): `counts` of them, which fall."""

    order: Tensor | None
    counts: Sequence[int]

    def take(self, x_NX: Tensor) -> list[Tensor]:
        """For each product its tokens [n, ...]."""
        ordered = take_rows(x_NX, self.order)
        return [ordered[:count] for count in self.counts]

    def add(self, parts_nX: Sequence[Tensor], count: int) -> Tensor:
        """[N, ...], of `count` tokens: each the sum over the products that it is in."""
        summed = parts_nX[0] if len(parts_nX) == 1 else _AddPrefixes.apply(*parts_nX)
        return put_rows(summed, self.order, count)


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
    """[count, ...]: inverse of `take_rows`, with zeros elsewhere."""
    if rows is None:
        return x_nX
    return _PutRows.apply(x_nX, rows, count) if torch.is_grad_enabled() else _put_rows(x_nX, rows, count)


def _put_rows(x_nX: Tensor, rows: Tensor, count: int) -> Tensor:
    if len(rows) < count:
        return x_nX.new_zeros(count, *x_nX.shape[1:]).index_copy_(0, rows, x_nX)
    place_N = torch.empty_like(rows).scatter_(0, rows, torch.arange(count, device=rows.device))
    return x_nX.index_select(0, place_N)  # faster than index_copy_


class _AddPrefixes(torch.autograd.Function):
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
