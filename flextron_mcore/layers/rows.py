"""Selection of rows of a matrix of tokens, for several matrix products that are each computed for some of the tokens.

Shape suffixes: N tokens, n tokens of one product, X remaining dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowIndex:
    """Tokens of each of several matrix products with slices of a weight, as indices.

    Attributes:
        rows: for each product indices [n] into the N tokens, or None for all tokens. No index may repeat within an entry, because
            the backward pass copies each token's gradient back to its row and does not add.
    """

    rows: Sequence[Tensor | None]

    def take(self, x_NX: Tensor) -> list[Tensor]:
        """Input of each matrix product: rows [n, ...] of `x_NX`."""
        return [take_rows(x_NX, rows) for rows in self.rows]


@dataclass(frozen=True)
class PrefixRows:
    """Tokens of each of several matrix products, as prefixes of one order of the tokens.

    Attributes:
        order: indices [counts[0]] of the first product's tokens, without repetition; None for all tokens in their own order.
        counts: number of tokens of each product, the first ones of `order`; never larger than the count before.
    """

    order: Tensor | None
    counts: Sequence[int]

    def take(self, x_NX: Tensor) -> list[Tensor]:
        """Input of each matrix product: rows [n, ...] of `x_NX`."""
        ordered = take_rows(x_NX, self.order)
        return [ordered[:count] for count in self.counts]

    def add(self, parts_nX: Sequence[Tensor], count: int) -> Tensor:
        """Sum over products of each token's results: [N, ...], zero for a token of no product.

        parts_nX: result [n, ...] of each product. count: number N of all tokens.
        """
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
    """Rows of a tensor: [N, ...] -> [n, ...], differentiable.

    No index may repeat: the backward pass copies each row's gradient and does not add. rows: indices [n], or None for all rows.
    """
    if rows is None:
        return x_NX
    return _TakeRows.apply(x_NX, rows) if torch.is_grad_enabled() else x_NX.index_select(0, rows)


def put_rows(x_nX: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """Inverse of `take_rows`, differentiable: [n, ...] -> [count, ...], with zeros in the other rows.

    Args:
        x_nX: values of the rows.
        rows: indices [n] of these rows without repetition, or None for all rows.
        count: number of rows of the result.
    """
    if rows is None:
        return x_nX
    return _PutRows.apply(x_nX, rows, count) if torch.is_grad_enabled() else _put_rows(x_nX, rows, count)


def _put_rows(x_nX: Tensor, rows: Tensor, count: int) -> Tensor:
    if len(rows) < count:
        return x_nX.new_zeros(count, *x_nX.shape[1:]).index_copy_(0, rows, x_nX)
    place_N = torch.empty_like(rows).scatter_(0, rows, torch.arange(count, device=rows.device))
    return x_nX.index_select(0, place_N)  # rows are a permutation: a gather is faster than index_copy_


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
