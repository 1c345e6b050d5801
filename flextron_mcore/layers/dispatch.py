"""Choices token by token, with the work really saved: what each level adds is a product of its own, for the tokens that have it.

Sub-networks are nested, so level k has the units of level k - 1 and some more. These are computed for the tokens of level k or
higher: K dense products with no padding and no masks, in which every weight is read once. Levels count a block's candidates from
0, the smallest; a token of level -1 (padding) takes part in nothing.

Shape suffixes: S sequence, B batch, N tokens (S*B), n tokens that take part, K candidates, C channels.
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
class Step:
    """What levels `first` to `last` add to those below, for tokens `rows` [n] of the N tokens, or None for all of them."""

    first: int
    last: int
    rows: Tensor | None


def by_level(levels_SB: Tensor) -> list[Step]:
    """The steps up to the highest level that occurs; neighbours with the same tokens are one. Waits for the device."""
    flat_N = levels_SB.flatten()
    if not len(flat_N):
        return []
    least, most = torch.stack(flat_N.aminmax()).tolist()
    if least == most:  # as when a single token is decoded
        return [Step(0, most, None)] if most >= 0 else []
    order_N = flat_N.argsort(descending=True, stable=True)
    counts = torch.bincount(flat_N + 1, minlength=most + 2).tolist()[1:]
    found: list[Step] = []
    first, taking = 0, sum(counts)
    for level, count in enumerate(counts):
        if count:
            found.append(Step(first, level, None if taking == len(flat_N) else order_N[:taking]))
            first, taking = level + 1, taking - count
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
    def by_level(cls, levels_SB: Tensor, count: int) -> list[Participants | None]:
        """For each of `count` levels the tokens of that level or a higher one; None where there are none."""
        if not levels_SB.numel():
            return [None] * count
        least, most = torch.stack(levels_SB.aminmax()).tolist()
        length, batch = levels_SB.shape
        device = levels_SB.device
        everyone = None
        if least >= 0:
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

    def without_filling(self, values_nBX: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values [m, ...] of those that take part, and which of the N tokens they are (None: all)."""
        flat = values_nBX.flatten(0, 1)
        if self.rows is None or values_nBX.shape[1] == 1:
            return flat, self.rows
        valid = self.valid_nB.flatten()
        return take_rows(flat, valid.nonzero().squeeze(-1)), self.rows[valid]


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


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count: int, rows: Sequence[Tensor | None], *parts_nX: Tensor) -> Tensor:  # type: ignore[override]
        ctx.rows = rows
        first = parts_nX[0]
        out = first.new_zeros(count, *first.shape[1:])
        for row, part in zip(rows, parts_nX, strict=True):
            if row is None:
                out.add_(part)
            else:
                out.index_add_(0, row, part)
        return out

    @staticmethod
    def backward(ctx, grad_NX: Tensor):  # type: ignore[override]
        return None, None, *(grad_NX if row is None else grad_NX.index_select(0, row) for row in ctx.rows)


def add_rows(parts_nX: Sequence[Tensor], rows: Sequence[Tensor | None], count: int) -> Tensor:
    """[count, ...]: the sum of the parts, each at its rows, which differ from each other (None: all of them)."""
    if len(parts_nX) == 1 and rows[0] is None:
        return parts_nX[0]
    return _AddRows.apply(count, rows, *parts_nX)
