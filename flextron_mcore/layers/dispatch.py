"""Choices token by token, with the work really saved: tokens are grouped, and each group is a product of its own.

Sub-networks are nested, so a token of level k needs the first units only: tokens of one level are multiplied with a prefix of the
weights, K dense products with no padding and no masks. Levels count a block's candidates from 0, the smallest; a token of level
-1 (padding) takes part in nothing.

Shape suffixes: S sequence, B batch, N tokens (S*B), n tokens of a group, K candidates, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor

KV_POLICIES = ("full", "own")


class BlockRouting(Protocol):
    """What chooses for the tokens of one block.

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


class Routing(Protocol):
    """What chooses for the tokens of a whole model."""

    def begin(self, number: int, counted_BS: Tensor | None) -> None:
        """Before each micro-batch, and before `block`: its number among all ranks' of a step, and which of its tokens count."""

    def block(self, index: int) -> BlockRouting:
        """That of a block: of layer l's attention at 2 l, of its MLP at 2 l + 1."""


class GivenLevels:
    """Routing by levels [N blocks, S, B] that are given: of all tokens of a micro-batch, of which a pass takes the next ones.

    For timing and tests. also: called with what enters a block, as routers are that would find the levels.
    """

    def __init__(
        self, levels_NSB: Tensor, kv_policy: str = "full", also: Callable[[int, Tensor], object] = lambda index, hidden: None
    ) -> None:
        self.levels_NSB, self.kv_policy, self.also = levels_NSB, kv_policy, also
        self.begin()

    def begin(self, number: int = 0, counted_BS: Tensor | None = None) -> None:
        """From the first token on."""
        self.position = [0] * len(self.levels_NSB)

    def block(self, index: int) -> BlockRouting:
        """The levels of a block."""
        return _GivenBlock(self, index)


@dataclass(frozen=True)
class _GivenBlock:
    given: GivenLevels
    index: int
    masked: ClassVar[bool] = False

    @property
    def kv_policy(self) -> str:
        return self.given.kv_policy

    def levels(self, hidden_SBC: Tensor, sequence_parallel: bool) -> Tensor:
        self.given.also(self.index, hidden_SBC)
        length = len(hidden_SBC) * (parallel_state.get_tensor_model_parallel_world_size() if sequence_parallel else 1)
        start = self.given.position[self.index]
        self.given.position[self.index] = start + length
        return self.given.levels_NSB[self.index, start : start + length]

    def masks(self, levels_SB: Tensor) -> Tensor:
        raise NotImplementedError("given levels have no gradient")


@dataclass(frozen=True)
class Group:
    """Tokens of one level; rows: their indices [n] among the N tokens, or None for all of them."""

    level: int
    rows: Tensor | None


def by_level(levels_SB: Tensor) -> list[Group]:
    """The tokens of each level that occurs, highest first, in order of position. Waits for the device once."""
    flat_N = levels_SB.flatten()
    if len(flat_N):
        least, most = torch.stack(flat_N.aminmax()).tolist()
        if least == most:  # as when a single token is decoded
            return [Group(most, None)] if most >= 0 else []
    order_N = flat_N.argsort(descending=True, stable=True)
    values, counts = flat_N.unique(return_counts=True)
    found, start = [], 0
    for level, count in sorted(zip(values.tolist(), counts.tolist(), strict=True), reverse=True):
        if level >= 0:
            found.append(Group(level, None if count == len(flat_N) else order_N[start : start + count]))
        start += count
    return found


@dataclass(frozen=True)
class Participants:
    """The tokens of each sequence that take part in something, in order of position.

    index_nB: their positions in the sequence, for n the most that any sequence has; shorter ones are filled up with others.
    valid_nB: which are no filling. rows: the same as indices [n*B] among the tokens, None where all take part.
    """

    index_nB: Tensor
    valid_nB: Tensor
    rows: Tensor | None

    @classmethod
    def by_level(cls, levels_SB: Tensor, groups: Sequence[Group], count: int) -> list[Participants | None]:
        """For each of `count` levels the tokens of that level or a higher one; None where there are none. groups: `by_level`'s."""
        if not groups:
            return [None] * count
        length, batch = levels_SB.shape
        device = levels_SB.device
        everyone, least, most = None, -1, groups[0].level
        if groups[0].rows is None or sum(len(group.rows) for group in groups) == length * batch:
            least = groups[-1].level
            index_nB = torch.arange(length, device=device)[:, None].expand(-1, batch)
            everyone = cls(index_nB, torch.ones(length, batch, dtype=torch.bool, device=device), None)
        return [everyone if level <= least else cls.of(levels_SB >= level) if level <= most else None for level in range(count)]

    @classmethod
    def of(cls, mask_SB: Tensor) -> Participants | None:
        """Those where the mask is true; None where it never is."""
        length, batch = mask_SB.shape
        counts_B = mask_SB.sum(0)
        least, most = (int(x) for x in torch.stack([counts_B.min(), counts_B.max()]).tolist()) if batch else (0, 0)
        if most == 0:
            return None
        index_nB = mask_SB.logical_not().to(torch.uint8).argsort(dim=0, stable=True)[:most]
        valid_nB = torch.arange(most, device=mask_SB.device)[:, None] < counts_B
        rows = None if least == length else (index_nB * batch + torch.arange(batch, device=mask_SB.device)).flatten()
        return cls(index_nB, valid_nB, rows)

    def scatter(self, values_nBX: Tensor, length: int) -> Tensor:
        """[n, B, ...] -> [S, B, ...] with zeros for tokens that do not take part."""
        if self.rows is None:
            return values_nBX
        batch = values_nBX.shape[1]
        valid = self.valid_nB.flatten()
        flat = put_rows([take_rows(values_nBX.flatten(0, 1), valid.nonzero().squeeze(-1))], [self.rows[valid]], length * batch)
        return flat.unflatten(0, (length, batch))


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NX: Tensor, rows: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows)
        ctx.count = len(x_NX)
        return x_NX.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad_nX: Tensor):  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        return grad_nX.new_zeros(ctx.count, *grad_nX.shape[1:]).index_copy_(0, rows, grad_nX), None


def take_rows(x_NX: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of a tensor, each at most once (its gradient is copied, not added up); None: all of them."""
    return x_NX if rows is None else _TakeRows.apply(x_NX, rows)


class _PutRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count: int, rows: Sequence[Tensor], *parts_nX: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*rows)
        whole = sum(map(len, rows)) == count
        first = parts_nX[0]
        out = (first.new_empty if whole else first.new_zeros)(count, *first.shape[1:])
        for row, part in zip(rows, parts_nX, strict=True):
            out.index_copy_(0, row, part)
        return out

    @staticmethod
    def backward(ctx, grad_NX: Tensor):  # type: ignore[override]
        return None, None, *(grad_NX.index_select(0, rows) for rows in ctx.saved_tensors)


def put_rows(parts_nX: Sequence[Tensor], rows: Sequence[Tensor | None], count: int) -> Tensor:
    """[count, ...] with the parts at their rows, which are disjoint, and zeros elsewhere; a part for None is all of it."""
    if rows[0] is None:
        return parts_nX[0]
    return _PutRows.apply(count, rows, *parts_nX)
