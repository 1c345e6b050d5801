"""Blocks of heads by level, and rotary embeddings at given positions, for attention with a level for every token.

Shape suffixes: S sequence, B batch, n participants of a sequence, G KV groups of this rank, Q query heads of a group, H channels
of a head, X anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flextron_mcore.layers.tokens.levels import Participants

if TYPE_CHECKING:  # avoids a cycle: the elastic layers and token routing do not import each other at run time
    from flextron_mcore.layers.attention import ElasticSelfAttention


@dataclass(frozen=True)
class HeadBlock:
    """Heads of this rank that a level adds to the level below: the query heads `queries` of each KV group in `groups`."""

    groups: slice
    queries: slice


@dataclass
class Run:
    """Neighbouring levels that the same tokens use, so that their heads are computed together.

    Attributes:
        block: all heads that these levels add.
        levels: the levels, lowest first.
        participants: tokens that use the heads.
    """

    block: HeadBlock
    levels: list[int]
    participants: Participants


def head_blocks(attention: ElasticSelfAttention) -> list[HeadBlock]:
    """Heads that each candidate adds to the next smaller one, smallest candidate first."""
    sizes, layout = attention.space.heads, attention.layout
    if attention.space.attention_unit == "kv_group":
        counts = [0, *(size // layout.queries // attention.world_size for size in sizes)]
        return [HeadBlock(slice(low, high), slice(layout.queries)) for low, high in pairwise(counts)]
    counts = [0, *(size // attention.config.num_query_groups for size in sizes)]
    return [HeadBlock(slice(layout.groups), slice(low, high)) for low, high in pairwise(counts)]


def level_of_heads(attention: ElasticSelfAttention, device: torch.device) -> Tensor:
    """Lowest level (index of the candidate) that has each query head of this rank [G*Q]."""
    level_GQ = torch.zeros(attention.layout.groups, attention.layout.queries, dtype=torch.long, device=device)
    for level, block in enumerate(head_blocks(attention)):
        level_GQ[block.groups, block.queries] = level
    return level_GQ.flatten()


def runs(blocks: list[HeadBlock], participants: list[Participants | None]) -> list[Run]:
    """Group neighbouring levels with the same participants into runs; levels without participants (None) are left out.

    Args:
        blocks: heads that each level adds.
        participants: tokens that use the heads of each level; one object for equal participants (`Participants.by_level`).
    """
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
    """Positions of the current tokens in the sequence, and the rotary embedding of their queries and keys.

    Args:
        start: position of the first token.
        length: number of tokens.
        rotary: rotary angles of all positions [T, 1, 1, channels], where the second half of the channels repeats the first; None
            for a model without rotary embedding.
        dtype: dtype of the cosines and sines.
        scale: factor of the cosines and sines.
    """

    def __init__(self, start: int, length: int, rotary: Tensor | None, dtype: torch.dtype, scale: float = 1.0) -> None:
        self.start = start
        self.turn_S = None
        if rotary is not None:  # once for all blocks of heads
            angles_S = rotary[start : start + length].chunk(2, -1)[0]
            self.turn_S = (torch.cat([angles_S.cos(), angles_S.sin()], -1) * scale).to(dtype).flatten(1)

    def rotate(self, x_nBXH: Tensor, index_nB: Tensor | None) -> Tensor:
        """Rotary embedding of queries or keys [n, B, ..., H] at positions start + index_nB; None for start, start + 1, ...

        A model without rotary embedding gets them unchanged.
        """
        if self.turn_S is None:
            return x_nBXH
        turn = self.turn_S[:, None] if index_nB is None else self.turn_S[index_nB]
        return _rotated(x_nBXH, turn.view(*turn.shape[:2], *(1 for _ in x_nBXH.shape[2:-1]), -1))

    def rotate_per_head(self, x_BGSH: Tensor) -> Tensor:
        """Rotary embedding at positions start, start + 1, ... of [B, G, S, H]; the result is contiguous."""
        return x_BGSH if self.turn_S is None else _rotated(x_BGSH, self.turn_S)


def _rotated(x_XH: Tensor, turn_XH: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + half) of the last dimension. turn: cosines, then sines."""
    cos, sin = turn_XH.chunk(2, -1)
    half = cos.shape[-1]
    first, second, rest = x_XH.split([half, half, x_XH.shape[-1] - 2 * half], dim=-1)
    turned = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
    return torch.cat([*turned, rest], dim=-1)
