"""Heads by level, and positions of the tokens that use them, for attention with a level for every token.

Shape suffixes: S sequence, B batch, n participants of a sequence, G KV groups of this rank, Q query heads of a group, X
anything, H channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flextron_mcore.layers.tokens.levels import Participants

if TYPE_CHECKING:  # the core layer does not import token routing, nor the reverse at run time
    from flextron_mcore.layers.attention import ElasticSelfAttention


@dataclass(frozen=True)
class HeadBlock:
    """Heads that a level adds, on this rank: query heads `queries` of each of the KV groups `groups`."""

    groups: slice
    queries: slice


@dataclass
class Run:
    """Neighbouring blocks of heads with the same participants, computed together: `levels`, which `block` joins."""

    block: HeadBlock
    levels: list[int]
    participants: Participants


def head_blocks(attention: ElasticSelfAttention) -> list[HeadBlock]:
    """One block for each candidate of the space, smallest first."""
    sizes, layout = attention.space.heads, attention.layout
    if attention.space.attention_unit == "kv_group":
        counts = [0, *(size // layout.queries // attention.world_size for size in sizes)]
        return [HeadBlock(slice(low, high), slice(layout.queries)) for low, high in pairwise(counts)]
    counts = [0, *(size // attention.config.num_query_groups for size in sizes)]
    return [HeadBlock(slice(layout.groups), slice(low, high)) for low, high in pairwise(counts)]


def level_of_heads(attention: ElasticSelfAttention, device: torch.device) -> Tensor:
    """Level that adds each query head of this rank: [G*Q]."""
    level_GQ = torch.zeros(attention.layout.groups, attention.layout.queries, dtype=torch.long, device=device)
    for level, block in enumerate(head_blocks(attention)):
        level_GQ[block.groups, block.queries] = level
    return level_GQ.flatten()


def runs(blocks: list[HeadBlock], participants: list[Participants | None]) -> list[Run]:
    """Runs of the blocks that have participants."""
    found: list[Run] = []
    for level, (block, those) in enumerate(zip(blocks, participants, strict=True)):
        if those is None:
            continue
        if found and (last := found[-1]).participants is those:
            if last.block.groups == block.groups:
                last.block = HeadBlock(block.groups, slice(last.block.queries.start, block.queries.stop))
            else:
                last.block = HeadBlock(slice(last.block.groups.start, block.groups.stop), block.queries)
            last.levels.append(level)
        else:
            found.append(Run(block, [level], those))
    return found


class Position:
    """Place of the tokens at hand in the sequence, and the rotary embedding of their queries and keys."""

    def __init__(self, start: int, length: int, rotary: Tensor | None, dtype: torch.dtype) -> None:
        """Tokens from `start` on, `length` of them. rotary: angles of all positions, twice next to each other; or None."""
        self.start = start
        self.turn_S = None
        if rotary is not None:  # once for all blocks of heads
            angles_S = rotary[start : start + length].chunk(2, -1)[0]
            self.turn_S = torch.cat([angles_S.cos(), angles_S.sin()], -1).to(dtype).flatten(1)

    def rotate(self, x_nBXH: Tensor, index_nB: Tensor | None) -> Tensor:
        """Rotary embedding at positions start + index (None: at start, start + 1, ...)."""
        if self.turn_S is None:
            return x_nBXH
        turn = self.turn_S[:, None] if index_nB is None else self.turn_S[index_nB]
        return _turned(x_nBXH, turn.view(*turn.shape[:2], *(1 for _ in x_nBXH.shape[2:-1]), -1))

    def rotate_per_head(self, x_BGSH: Tensor) -> Tensor:
        """Rotary embedding at start, start + 1, ...; the result lies in memory in the order of its name."""
        return x_BGSH if self.turn_S is None else _turned(x_BGSH, self.turn_S)


def _turned(x_XH: Tensor, turn_XH: Tensor) -> Tensor:
    """Pairs of channels turned by an angle; turn: cosines and sines."""
    cos, sin = turn_XH.chunk(2, -1)
    half = cos.shape[-1]
    first, second, rest = x_XH.split([half, half, x_XH.shape[-1] - 2 * half], dim=-1)
    turned = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
    return torch.cat([*turned, rest], dim=-1)
