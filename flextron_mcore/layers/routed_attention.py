"""Attention in which every token uses the heads of its own level (layers/dispatch.py).

Heads are computed in blocks: block k holds those that level k has and level k - 1 has not, and is computed for the tokens of
level k or higher, its participants. With `kv_policy=full` all tokens write keys and values for all heads, and only queries and
the output projection are routed. With `own`, and whole KV groups as units, the participants write keys and values too, and
attend to each other only: causal attention over the sub-sequence that they form, at its tokens' own positions.

Shape suffixes: S sequence, B batch, N tokens (S*B), n participants of a sequence, T keys, G KV groups of this rank, g those of a
block, q query heads of a group in a block, H channels of a head, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from flextron_mcore.config import FlextronError
from flextron_mcore.layers.dispatch import BlockRouting, Given, Leading, Participants, falling, on_gpu, put_rows, take_rows
from flextron_mcore.layers.own_cache import OwnCache

_PARTS, _LEAST = 8, 64  # of the queries of a block of heads: how many parts, and how many queries in each

if TYPE_CHECKING:
    from flextron_mcore.layers.attention import ElasticSelfAttention
    from flextron_mcore.layers.linear import Selection


@dataclass(frozen=True)
class HeadBlock:
    """The heads that a level adds, on this rank: query heads `queries` of each of the KV groups `groups`."""

    groups: slice
    queries: slice


def head_blocks(attention: ElasticSelfAttention) -> list[HeadBlock]:
    """One for each candidate of the space, smallest first."""
    sizes, ranks, group_size = attention.space.heads, attention.world_size, attention.layout.queries
    if attention.space.attention_unit == "kv_group":
        counts = [0, *(size // group_size // ranks for size in sizes)]
        return [HeadBlock(slice(low, high), slice(group_size)) for low, high in pairwise(counts)]
    counts = [0, *(size // attention.config.num_query_groups for size in sizes)]
    return [HeadBlock(slice(attention.layout.groups), slice(low, high)) for low, high in pairwise(counts)]


@dataclass
class _Run:
    """Blocks of heads next to each other with the same participants; `levels` of them, which `block` is together."""

    block: HeadBlock
    levels: list[int]
    participants: Participants


def _runs(blocks: list[HeadBlock], participants: list[Participants | None]) -> list[_Run]:
    """The blocks that have participants; neighbours with the same ones are one run."""
    found: list[_Run] = []
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
            found.append(_Run(block, [level], those))
    return found


def level_of_heads(attention: ElasticSelfAttention, device: torch.device) -> Tensor:
    """The block that each query head of this rank belongs to: [heads]."""
    level_GQ = torch.zeros(attention.layout.groups, attention.layout.queries, dtype=torch.long, device=device)
    for level, block in enumerate(head_blocks(attention)):
        level_GQ[block.groups, block.queries] = level
    return level_GQ.flatten()


def own_keys(attention: ElasticSelfAttention, routing: BlockRouting) -> bool:
    """Whether a token writes keys and values only for what it uses: with query heads as units it uses all KV groups."""
    return routing.kv_policy == "own" and attention.space.attention_unit == "kv_group"


def masked_keys(attention: ElasticSelfAttention, routing: BlockRouting, levels_SB: Tensor) -> Tensor | None:
    """Mask [B, heads, S, S] of the keys that a token must not see with `own` keys, None where it is the causal one."""
    if not own_keys(attention, routing):
        return None
    length = len(levels_SB)
    taken_hSB = levels_SB >= level_of_heads(attention, levels_SB.device)[:, None, None]
    position = torch.arange(length, device=levels_SB.device)
    # Every token sees itself: what does not take part is multiplied with zero afterwards, and must be a number.
    allowed = taken_hSB.permute(2, 0, 1)[:, :, None, :] & (position <= position[:, None]) | (position == position[:, None])
    return allowed.logical_not()


class _Position:
    """Where the tokens at hand lie in the sequence, and what turns their queries and keys there."""

    def __init__(self, start: int, length: int, rotary: Tensor | None, dtype: torch.dtype) -> None:
        """The `length` tokens from `start` on. rotary: angles of all positions, both halves alike; or None."""
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
        """The same at start, start + 1, ...; the result lies in memory as it is said here."""
        return x_BGSH if self.turn_S is None else _turned(x_BGSH, self.turn_S)


def _turned(x_XH: Tensor, turn_XH: Tensor) -> Tensor:
    """turn: cosines and sines."""
    cos, sin = turn_XH.chunk(2, -1)
    half = cos.shape[-1]
    first, second, rest = x_XH.split([half, half, x_XH.shape[-1] - 2 * half], dim=-1)
    turned = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
    return torch.cat([*turned, rest], dim=-1)


def routed_attention(
    attention: ElasticSelfAttention,
    routing: BlockRouting,
    hidden_states: Tensor,
    levels_SB: Tensor,
    key_value_states: Tensor | None = None,
    inference_context: Any = None,
    rotary_pos_emb: Any = None,
    inference_params: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention of tokens with levels: [S, B, C] -> ([S, B, C], bias or None). Arguments as Megatron-Core's attention."""
    context = inference_context or inference_params
    unsupported = [name for name in ("packed_seq_params", "attention_bias", "rotary_pos_cos") if kwargs.get(name) is not None]
    if unsupported or (context is not None and not context.is_static_batching()) or attention.config.apply_rope_fusion:
        raise FlextronError(
            "routing token by token does not support "
            + (" and ".join(unsupported) or "dynamic batching and fused rotary embeddings")
        )
    start = context.sequence_len_offset if context is not None else 0
    rotary = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
    position = _Position(start, len(levels_SB), rotary, hidden_states.dtype)
    if routing.masked:
        return _masked(attention, routing, hidden_states, levels_SB, position)
    blocks = head_blocks(attention)
    present = _runs(blocks, Participants.by_level(levels_SB, len(blocks)))
    if own_keys(attention, routing):
        heads = _own(attention, hidden_states, blocks, present, position, context)
    else:
        heads = _full(attention, hidden_states, present, position, context)
    return _project(attention, heads, present, levels_SB)


def _masked(
    attention: ElasticSelfAttention, routing: BlockRouting, hidden_states: Tensor, levels_SB: Tensor, position: _Position
) -> tuple[Tensor, Tensor | None]:
    """All heads of all tokens, times masks through which the levels get a gradient."""
    query, key, value = attention.get_query_key_value_tensors(hidden_states)
    query, key, hidden = position.rotate(query, None), position.rotate(key, None), masked_keys(attention, routing, levels_SB)
    recompute = attention.checkpoint_core_attention and attention.training
    attend = attention._checkpointed_attention_forward if recompute else attention.core_attention
    kind = AttnMaskType.causal if hidden is None else AttnMaskType.arbitrary
    heads = attend(query, key, value, hidden, attn_mask_type=kind)
    mask_SBh = routing.masks(levels_SB).index_select(-1, level_of_heads(attention, levels_SB.device))
    return attention.linear_proj(heads, mask_h=mask_SBh)


def _full(
    attention: ElasticSelfAttention,
    hidden_states: Tensor,
    present: list[_Run],
    position: _Position,
    context: Any,
) -> list[Tensor]:
    """The heads of each run [n, B, h, H]; keys and values of all tokens."""
    size, group_size, every = _sizes(attention)
    batch = hidden_states.shape[1]
    length = _length(attention, hidden_states)
    queries = [(run.block.groups, run.block.queries) for run in present]
    joint = int(bool(present) and present[0].participants.rows is None)
    # Without a cache there are no later tokens, which might want the keys and values of heads that none uses here.
    groups = every if context is not None else max((run.block.groups.stop for run in present), default=every)
    # One product for what all tokens have: all keys and values, and the queries of the first run where they take part in it.
    both = (slice(groups), slice(group_size, group_size + 2))
    parts = [[both, *queries[:joint]], *([part] for part in queries[joint:])]
    selections = [_rows(attention, part) for part in parts]
    rows = Given([None, *(run.participants.rows for run in present[joint:])])
    mixed, *products = attention.linear_qkv(hidden_states, *selections, rows=rows)
    if joint:
        mixed, first = mixed.tensor_split([2 * groups * size], -1)
        products.insert(0, first)
    keys_values = mixed.view(length, batch, groups, 2, size)
    if context is None and not on_gpu(mixed) and any(run.participants.rows is not None for run in present):
        # A head's keys next to each other in memory: every part of its queries reads them.
        key_BGSH, value_BGSH = keys_values.permute(3, 1, 2, 0, 4).contiguous()
        key_BGSH = position.rotate_per_head(_normed(attention.k_layernorm, key_BGSH))
        key, value = key_BGSH.permute(2, 0, 1, 3), value_BGSH.permute(2, 0, 1, 3)
    else:
        key, value = keys_values.unbind(-2)
        key = position.rotate(_normed(attention.k_layernorm, key), None)
    if context is not None:
        key, value = _cached(attention, context, key, value)
    out = []
    for run, product in zip(present, products, strict=True):
        block, found = run.block, run.participants
        query = _normed(attention.q_layernorm, product.view(len(found.index_nB), batch, product.shape[-1] // size, size))
        query = position.rotate(query, None if found.rows is None else found.index_nB)
        keys, values = key[:, :, block.groups], value[:, :, block.groups]
        if found.rows is None:
            out.append(_attend(attention, query, keys, values, None))
        elif on_gpu(query):
            out.append(_attend_among_all(attention, query, keys, values, found, length))
        else:
            out.append(_attend_up_to(attention, query, keys, values, position.start + found.index_nB))
    return out


def _own(
    attention: ElasticSelfAttention,
    hidden_states: Tensor,
    blocks: list[HeadBlock],
    present: list[_Run],
    position: _Position,
    context: Any,
) -> list[Tensor]:
    """The same with keys and values of each block's participants only."""
    size, group_size, _ = _sizes(attention)
    batch = hidden_states.shape[1]
    parts = [_rows(attention, [(run.block.groups, slice(group_size + 2))]) for run in present]
    caches = None
    if context is not None:
        caches = context.key_value_memory_dict.setdefault(
            attention.layer_number,
            [OwnCache(torch.zeros(batch, dtype=torch.long, device=hidden_states.device)) for _ in blocks],
        )
    rows = Given([run.participants.rows for run in present])
    products = attention.linear_qkv(hidden_states, *parts, rows=rows) if present else []
    out = []
    for run, product in zip(present, products, strict=True):
        found, first = run.participants, run.block.groups.start
        mixed = product.view(len(found.index_nB), batch, -1, group_size + 2, size)
        index = None if found.rows is None else found.index_nB
        if on_gpu(mixed) and attention.q_layernorm is None and attention.k_layernorm is None:
            both = position.rotate(mixed[..., :-1, :], index)  # together: fewer kernels, but keys lie apart
            query, key = both[..., :-1, :].flatten(2, 3), both[..., -1, :]
        else:
            parts = _normed(attention.q_layernorm, mixed[..., :-2, :]), _normed(attention.k_layernorm, mixed[..., -2:-1, :])
            query, key = (position.rotate(x.flatten(2, 3), index) for x in parts)
        value = mixed[..., -1, :]
        if caches is None:
            # Filling follows a sequence's own participants, which therefore do not see it.
            out.append(_attend(attention, query, key, value, None))
            continue
        parts = []
        for level in run.levels:  # each has a cache of its own: of as many tokens as have ever taken part in it
            of = slice(blocks[level].groups.start - first, blocks[level].groups.stop - first)
            heads = slice(of.start * group_size, of.stop * group_size)
            keys, values, mask = caches[level].append(found, key[:, :, of], value[:, :, of])
            parts.append(_attend(attention, query[:, :, heads], keys, values, mask))
        out.append(torch.cat(parts, 2) if len(parts) > 1 else parts[0])
    return out


def _attend(attention: ElasticSelfAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Core attention: [n, B, h, H], [T, B, g, H] x 2 -> [n, B, h, H]; mask None: causal, the last query sees all keys."""
    kind = AttnMaskType.causal if mask is None else AttnMaskType.arbitrary
    return attention.core_attention(query, key, value, mask, attn_mask_type=kind).view(*query.shape)


def _attend_among_all(
    attention: ElasticSelfAttention, query: Tensor, key: Tensor, value: Tensor, participants: Participants, length: int
) -> Tensor:
    """Core attention of queries at their places among `length` tokens, with zeros in between: without a mask."""
    batch = query.shape[1]
    every_NhH = put_rows(query.flatten(0, 1), participants.rows, length * batch)
    heads = _attend(attention, every_NhH.view(length, batch, *query.shape[2:]), key, value, None)
    return take_rows(heads.flatten(0, 1), participants.rows).view(query.shape)


def _attend_up_to(attention: ElasticSelfAttention, query: Tensor, key: Tensor, value: Tensor, seen_nB: Tensor) -> Tensor:
    """Core attention of queries that each see the keys up to a position of their own, which rises but for filling.

    In parts, for which only keys are computed that one of its queries sees: in one, half of the products would be for nothing.
    """
    count, length = len(query), len(key)
    step = max(-(-count // _PARTS), _LEAST)
    starts = range(0, count, step)
    # The largest so far: what shorter sequences are filled up with may lie anywhere.
    limits = seen_nB.amax(1).cummax(0).values[[min(start + step, count) - 1 for start in starts]] + 1
    # A query's row of the mask is what of this lies from `first` on: nothing hidden up to the position that it sees, then all.
    hidden = attention.core_attention.as_mask(torch.arange(2 * length, device=seen_nB.device) >= length)
    first_Bn = length - 1 - seen_nB.T
    out = []
    for start, limit in zip(starts, limits.tolist(), strict=True):
        part = slice(start, start + step)
        rows = first_Bn[:, part]
        mask = hidden.unfold(0, limit, 1).index_select(0, rows.flatten()).view(len(rows), 1, -1, limit)
        out.append(_attend(attention, query[part], key[:limit], value[:limit], mask))
    return torch.cat(out) if len(out) > 1 else out[0]


def _project(
    attention: ElasticSelfAttention, heads: list[Tensor], present: list[_Run], levels_SB: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The output projection of each token's own heads."""
    if heads and on_gpu(heads[0]):
        return _project_joined(attention, heads, present, levels_SB)
    if not heads:  # padding only
        nothing = attention.linear_proj.weight.new_zeros(0, 0)
        none = Leading(levels_SB.new_empty(0), [0])
        return attention.linear_proj([nothing], [_columns(attention, slice(0), slice(0))], none, levels_SB.shape)
    # By falling level, so that what a run adds is added to the first tokens, where the sum lies.
    found = [run.participants for run in present]
    order = None if found[-1].rows is None else falling(levels_SB.flatten())
    inputs = [those.ordered(values, order).flatten(1) for those, values in zip(found, heads, strict=True)]
    parts = [_columns(attention, run.block.groups, run.block.queries) for run in present]
    counts = [those.count for those in found]
    taking = Leading(None if order is None else order[: counts[0]], counts)
    return attention.linear_proj(inputs, parts, taking, levels_SB.shape)


def _project_joined(
    attention: ElasticSelfAttention, heads: list[Tensor], present: list[_Run], levels_SB: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same as one product, with zeros for heads that a token has not."""
    joined = []
    for run, values_nBhH in zip(present, heads, strict=True):
        found, (groups, queries) = run.participants, (run.block.groups, run.block.queries)
        if found.count < found.valid_nB.numel():  # those that fill up have none of these heads
            values_nBhH = values_nBhH.masked_fill(found.valid_nB.logical_not()[..., None, None], 0)
        values_NhH = put_rows(values_nBhH.flatten(0, 1), found.rows, levels_SB.numel())
        shape = (groups.stop - (groups.start or 0), queries.stop - (queries.start or 0))
        joined.append(values_NhH.unflatten(1, shape))
    dim = 1 if attention.space.attention_unit == "kv_group" else 2
    values_NGQH = torch.cat(joined, dim) if len(joined) > 1 else joined[0]
    last = present[-1].block
    part = _columns(attention, slice(last.groups.stop), slice(last.queries.stop))
    every = Leading(None, [levels_SB.numel()])
    return attention.linear_proj([values_NGQH.flatten(1)], [part], every, levels_SB.shape)


def _cached(attention: ElasticSelfAttention, context: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Put into, and take from, Megatron-Core's cache of the layer: all keys and values up to now."""
    layer, start = attention.layer_number, context.sequence_len_offset
    if layer not in context.key_value_memory_dict:
        context.key_value_memory_dict[layer] = tuple(
            attention._allocate_memory(context.max_sequence_length, context.max_batch_size, key.shape[-1], key.dtype)
            for _ in range(2)
        )
    end, batch = start + len(key), key.shape[1]
    for memory, new in zip(context.key_value_memory_dict[layer], (key, value), strict=True):
        memory[start:end, :batch] = new
    return tuple(memory[:end, :batch] for memory in context.key_value_memory_dict[layer])  # type: ignore[return-value]


def _normed(norm: torch.nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _length(attention: ElasticSelfAttention, hidden_states: Tensor) -> int:
    """S, of which a rank has a part with sequence parallelism."""
    return len(hidden_states) * (attention.world_size if attention.config.sequence_parallel else 1)


def _sizes(attention: ElasticSelfAttention) -> tuple[int, int, int]:
    """Channels of a head, query heads of a group, KV groups of this rank."""
    return attention.layout.size, attention.layout.queries, attention.layout.groups


def _rows(attention: ElasticSelfAttention, heads: list[tuple[slice, slice]]) -> tuple[Selection, Selection]:
    hidden = attention.linear_qkv.weight.shape[1]
    return attention.layout.rows(heads, hidden, hidden)


def _columns(attention: ElasticSelfAttention, groups: slice, queries: slice) -> Selection:
    hidden = attention.linear_proj.weight.shape[0]
    return attention.layout.columns(groups, queries, hidden, hidden)
