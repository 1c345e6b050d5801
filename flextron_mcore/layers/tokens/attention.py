"""Self-attention in which every token uses the heads of its own level.

Heads are computed in blocks. Block k holds the heads that level k adds to level k - 1. It is computed for its participants: the
tokens of level k or higher. With `kv_policy=full` all tokens write keys and values of all heads, and only queries and the output
projection are routed. With `kv_policy=own` (KV groups as units) only participants write a block's keys and values, and they
attend to each other only: causal attention over the sub-sequence of participants, at the original positions.

Shape suffixes: S sequence, B batch, N tokens (S*B), n participants of a sequence, T keys, G KV groups of this rank, g groups of a
block, Q query heads of a group, h query heads of a block, H channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from flextron_mcore.config import FlextronError
from flextron_mcore.layers.compensation import compensated
from flextron_mcore.layers.linear import Selection
from flextron_mcore.layers.rotary import rotary_scale
from flextron_mcore.layers.rows import PrefixRows, RowIndex, put_rows, take_rows
from flextron_mcore.layers.state import Output
from flextron_mcore.layers.tokens.cache import OwnCache
from flextron_mcore.layers.tokens.heads import Position, Run, head_blocks, level_of_heads, runs
from flextron_mcore.layers.tokens.levels import BlockRouting, Participants, decreasing_order, waits_are_expensive

if TYPE_CHECKING:  # avoids a cycle: the elastic layers and token routing do not import each other at run time
    from flextron_mcore.layers.attention import ElasticSelfAttention

_PARTS, _LEAST = 8, 64  # largest number of pieces of a run's queries, and least number of queries in each


def routed_attention(
    module: ElasticSelfAttention,
    routing: BlockRouting,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    inference_context: BaseInferenceContext | None = None,
    rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
    inference_params: BaseInferenceContext | None = None,
    **kwargs: Any,
) -> Output:
    """Self-attention with a level (index of the candidate) for every token: [S, B, C] -> ([S, B, C], bias [C] or None).

    Attention is causal. Raises FlextronError for packed sequences, attention biases, dynamic batching, fused rotary embeddings
    and sliding windows.

    Args:
        module: attention whose weights are used.
        routing: levels of the tokens, and the KV policy.
        hidden_states: input [S, B, C].
        key_value_states: unused, as in Megatron-Core's self-attention.
        inference_context: Megatron-Core's static KV cache; None to compute without.
        rotary_pos_emb: rotary angles of all positions; a pair holds the angles of queries and of keys.
        inference_params: older name of `inference_context`.
    """
    context = inference_context or inference_params
    unsupported = [name for name in ("packed_seq_params", "attention_bias", "rotary_pos_cos") if kwargs.get(name) is not None]
    if unsupported or (context is not None and not context.is_static_batching()) or module.config.apply_rope_fusion:
        raise FlextronError(
            f"token routing does not support {' and '.join(unsupported)}: pass None"
            if unsupported
            else "token routing does not support dynamic batching or fused rotary embeddings: use static batching and "
            "apply_rope_fusion=False"
        )
    if module.config.window_size is not None:
        raise FlextronError("token routing does not support model.sliding_window: set it to null, or choose networks by budget")
    levels_SB = routing.levels(hidden_states, module.config.sequence_parallel)
    start = context.sequence_len_offset if context is not None else 0
    rotary = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
    if module.config.no_rope_freq and module.config.no_rope_freq[module.layer_number - 1]:
        rotary = None
    position = Position(start, len(levels_SB), rotary, hidden_states.dtype, rotary_scale(module.config))
    # With query heads as units every token uses all KV groups, so both policies are the same.
    own = routing.kv_policy == "own" and module.space.attention_unit == "kv_group"
    if routing.masked:
        return _masked(module, routing, hidden_states, levels_SB, position, own)
    present = runs(head_blocks(module), Participants.by_level(levels_SB, len(module.space.heads)))
    computed = _Pass(module, hidden_states, levels_SB, position, present, context)
    return computed.projected(computed.own_keys() if own else computed.all_keys())


def _masked(
    module: ElasticSelfAttention, routing: BlockRouting, hidden_states: Tensor, levels_SB: Tensor, position: Position, own: bool
) -> Output:
    """Attention with all heads for all tokens, multiplied with masks through which the levels get a gradient.

    Args:
        module: attention whose weights are used.
        routing: routing of the block, whose masks multiply the heads' outputs.
        hidden_states: input [S, B, C].
        levels_SB: level of each token: index of its candidate, -1 for padding.
        position: positions of the tokens and their rotary embedding.
        own: True for kv_policy=own: a token sees keys of a group only from tokens that use it.
    """
    query, key, value = module.get_query_key_value_tensors(hidden_states)
    query, key = position.rotate(query, None), position.rotate(key, None)
    level_h = level_of_heads(module, levels_SB.device)
    hidden = hidden_keys(levels_SB, level_h) if own else None
    recompute = module.checkpoint_core_attention and module.training
    attend = module._checkpointed_attention_forward if recompute else module.core_attention
    kind = AttnMaskType.causal if hidden is None else AttnMaskType.arbitrary
    heads = attend(query, key, value, hidden, attn_mask_type=kind)
    return module.linear_proj(heads, mask_h=routing.masks(levels_SB).index_select(-1, level_h))


def hidden_keys(levels_SB: Tensor, level_h: Tensor) -> Tensor:
    """Mask [B, heads, S, S] for kv_policy=own, True where a query must not see a key.

    Hidden are later keys, and keys of tokens that do not use the head. A token always sees itself.

    Args:
        levels_SB: level of each token: index of its candidate, -1 for padding.
        level_h: lowest level that has each head [heads].
    """
    position = torch.arange(len(levels_SB), device=levels_SB.device)
    taken_hSB = levels_SB >= level_h[:, None, None]
    # A query without any key would give NaN. Every token sees itself; outputs of non-participants are multiplied with 0 later.
    allowed = taken_hSB.permute(2, 0, 1)[:, :, None, :] & (position <= position[:, None]) | (position == position[:, None])
    return allowed.logical_not()


@dataclass(frozen=True)
class _Pass:
    """Forward pass of an attention with a level for every token.

    Attributes:
        module: attention whose weights are used.
        hidden_states: input [S, B, C].
        levels_SB: level of each token: index of its candidate, -1 for padding.
        position: positions of the tokens and their rotary embedding.
        present: runs of heads that any token uses.
        context: Megatron-Core's static KV cache; None to compute without.
    """

    module: ElasticSelfAttention
    hidden_states: Tensor
    levels_SB: Tensor
    position: Position
    present: list[Run]
    context: BaseInferenceContext | None

    def all_keys(self) -> list[Tensor]:
        """Heads' outputs [n, B, h, H] of each run, over keys and values of all tokens (kv_policy=full)."""
        module, present = self.module, self.present
        size, group_size, (length, batch) = module.layout.size, module.layout.queries, self.levels_SB.shape
        queries = [(run.block.groups, run.block.queries) for run in present]
        joint = int(bool(present) and present[0].participants.rows is None)
        groups = module.layout.groups
        if self.context is None and present:  # without a cache, keys and values of unused groups are never read
            groups = max(run.block.groups.stop for run in present)
        # All keys and values are one product for all tokens; so are the first run's queries if all tokens are its participants.
        both = (slice(groups), slice(group_size, group_size + 2))
        parts = [[both, *queries[:joint]], *([part] for part in queries[joint:])]
        rows = RowIndex([None, *(run.participants.rows for run in present[joint:])])
        shared, *products = module.linear_qkv(self.hidden_states, *map(self._rows, parts), rows=rows)
        if joint:
            shared, first = shared.tensor_split([2 * groups * size], -1)
            products.insert(0, first)
        key, value = self._keys_values(shared.view(length, batch, groups, 2, size))
        out = []
        for run, product in zip(present, products, strict=True):
            block, found = run.block, run.participants
            query = _normed(module.q_layernorm, product.view(len(found.index_nB), batch, product.shape[-1] // size, size))
            query = self.position.rotate(query, None if found.rows is None else found.index_nB)
            keys, values = key[:, :, block.groups], value[:, :, block.groups]
            if found.rows is None:
                out.append(_attend(module, query, keys, values, None))
            elif waits_are_expensive(query):
                out.append(self._attend_among_all(query, keys, values, found))
            else:
                out.append(_attend_up_to(module, query, keys, values, self.position.start + found.index_nB))
        return out

    def _keys_values(self, shared_SBG2H: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far (with a cache: earlier ones too), each [T, B, G, H]."""
        module, context = self.module, self.context
        partial = any(run.participants.rows is not None for run in self.present)
        if context is None and partial and not waits_are_expensive(shared_SBG2H):
            # Contiguous keys for each head, because every part of its queries reads them (_attend_up_to).
            key_BGSH, value_BGSH = shared_SBG2H.permute(3, 1, 2, 0, 4).contiguous()
            key_BGSH = self.position.rotate_per_head(_normed(module.k_layernorm, key_BGSH))
            return key_BGSH.permute(2, 0, 1, 3), value_BGSH.permute(2, 0, 1, 3)
        key, value = shared_SBG2H.unbind(-2)
        key = self.position.rotate(_normed(module.k_layernorm, key), None)
        return (key, value) if context is None else _cached(module, context, key, value)

    def own_keys(self) -> list[Tensor]:
        """Heads' outputs [n, B, h, H] of each run, over keys and values of its participants (kv_policy=own)."""
        module, batch = self.module, self.levels_SB.shape[1]
        size, group_size = module.layout.size, module.layout.queries
        parts = [self._rows([(run.block.groups, slice(group_size + 2))]) for run in self.present]
        rows = RowIndex([run.participants.rows for run in self.present])
        products = module.linear_qkv(self.hidden_states, *parts, rows=rows) if self.present else []
        out = []
        for run, product in zip(self.present, products, strict=True):
            found = run.participants
            joined = product.view(len(found.index_nB), batch, -1, group_size + 2, size)
            index = None if found.rows is None else found.index_nB
            if waits_are_expensive(joined) and module.q_layernorm is None and module.k_layernorm is None:
                both = self.position.rotate(joined[..., :-1, :], index)  # one call: fewer kernels, but strided keys
                query, key = both[..., :-1, :].flatten(2, 3), both[..., -1, :]
            else:
                parts = _normed(module.q_layernorm, joined[..., :-2, :]), _normed(module.k_layernorm, joined[..., -2:-1, :])
                query, key = (self.position.rotate(x.flatten(2, 3), index) for x in parts)
            # Padding follows a sequence's participants, so the causal mask hides it from them.
            attend = self._attend_cached if self.context is not None else lambda _, *parts: _attend(module, *parts, None)
            out.append(attend(run, query, key, joined[..., -1, :]))
        return out

    def _attend_cached(self, run: Run, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Core attention of a run with a KV cache: [n, B, h, H]. Each level of the run has its own cache of its participants.

        Args:
            run: neighbouring levels that the same tokens use.
            query: queries of the run's participants [n, B, h, H].
            key, value: their new keys and values [n, B, g, H].
        """
        module, blocks, group_size = self.module, head_blocks(self.module), self.module.layout.queries
        nobody_B = torch.zeros(query.shape[1], dtype=torch.long, device=query.device)
        caches = self.context.key_value_memory_dict.setdefault(module.layer_number, [OwnCache(nobody_B) for _ in blocks])
        parts, first = [], run.block.groups.start
        for level in run.levels:
            of = slice(blocks[level].groups.start - first, blocks[level].groups.stop - first)
            heads = slice(of.start * group_size, of.stop * group_size)
            keys, values, mask = caches[level].append(run.participants, key[:, :, of], value[:, :, of])
            parts.append(_attend(module, query[:, :, heads], keys, values, mask))
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def _attend_among_all(self, query: Tensor, key: Tensor, value: Tensor, participants: Participants) -> Tensor:
        """Core attention of the participants' queries over keys of all tokens: [n, B, h, H].

        Other tokens get zero queries, so that the plain causal mask serves.

        Args:
            query: queries of the participants [n, B, h, H].
            key, value: keys and values of all tokens so far [T, B, g, H].
            participants: tokens that use the heads.
        """
        (length, batch), tokens = self.levels_SB.shape, self.levels_SB.numel()
        every_NhH = put_rows(query.flatten(0, 1), participants.rows, tokens)
        heads = _attend(self.module, every_NhH.view(length, batch, *query.shape[2:]), key, value, None)
        return take_rows(heads.flatten(0, 1), participants.rows).view(query.shape)

    def projected(self, heads: list[Tensor]) -> Output:
        """Output projection, for each token of the heads that it uses: ([S, B, C], bias [C] or None).

        heads: outputs [n, B, h, H] of the heads of each run in `present`, as `all_keys` or `own_keys` returns them.
        """
        if heads and waits_are_expensive(heads[0]):
            return self._projected_together(heads)
        project, shape = self.module.linear_proj, self.levels_SB.shape
        if not heads:  # all tokens are padding
            nothing, none = project.weight.new_zeros(0, 0), PrefixRows(self.levels_SB.new_empty(0), [0])
            return project([nothing], [self._columns(slice(0), slice(0))], none, shape)
        # With tokens in the order of decreasing level, each run adds to a prefix of the sum.
        found = [run.participants for run in self.present]
        order = None if found[-1].rows is None else decreasing_order(self.levels_SB.flatten())
        inputs = self._compensated([those.ordered(values, order) for those, values in zip(found, heads, strict=True)])
        parts = [self._columns(run.block.groups, run.block.queries) for run in self.present]
        counts = [those.count for those in found]
        return project(inputs, parts, PrefixRows(None if order is None else order[: counts[0]], counts), shape)

    def _compensated(self, heads: list[Tensor]) -> list[Tensor]:
        """Inputs [n, d] of the output projection: the heads' outputs [n, h, H] of each run, less what earlier heads predict.

        The tokens of a run are the first ones of each run before it.
        """
        matrix_GQQ = self.module.linear_proj.compensation
        if matrix_GQQ is None:
            return [values.flatten(1) for values in heads]
        grouped, inputs = [values.unflatten(1, (len(matrix_GQQ), -1)) for values in heads], []
        for number, run in enumerate(self.present):
            earlier_nGqH = torch.cat([values[: len(grouped[number])] for values in grouped[: number + 1]], 2)
            rows_Gqr = matrix_GQQ[:, run.block.queries, : run.block.queries.stop]
            inputs.append(compensated(earlier_nGqH, rows_Gqr).flatten(1))
        return inputs

    def _projected_together(self, heads: list[Tensor]) -> Output:
        """Output projection as one product for all tokens, with zeros for heads that a token does not use."""
        joined, tokens = [], self.levels_SB.numel()
        for run, values_nBhH in zip(self.present, heads, strict=True):
            found, (groups, queries) = run.participants, (run.block.groups, run.block.queries)
            if found.count < found.valid_nB.numel():  # padding does not use these heads
                values_nBhH = values_nBhH.masked_fill(found.valid_nB.logical_not()[..., None, None], 0)
            values_NhH = put_rows(values_nBhH.flatten(0, 1), found.rows, tokens)
            shape = (groups.stop - (groups.start or 0), queries.stop - (queries.start or 0))
            joined.append(values_NhH.unflatten(1, shape))
        dim = 1 if self.module.space.attention_unit == "kv_group" else 2
        values_NGQH = torch.cat(joined, dim) if len(joined) > 1 else joined[0]
        last = self.present[-1].block
        if (matrix_GQQ := self.module.linear_proj.compensation) is not None:
            queries = last.queries.stop
            level_GQ = level_of_heads(self.module, self.levels_SB.device).unflatten(0, matrix_GQQ.shape[:2])[:, :queries]
            unused_NGQ = self.levels_SB.flatten()[:, None, None] < level_GQ
            values_NGQH = compensated(values_NGQH, matrix_GQQ[:, :queries, :queries]).masked_fill(unused_NGQ[..., None], 0)
        part = self._columns(slice(last.groups.stop), slice(last.queries.stop))
        return self.module.linear_proj([values_NGQH.flatten(1)], [part], PrefixRows(None, [tokens]), self.levels_SB.shape)

    def _rows(self, heads: list[tuple[slice, slice]]) -> tuple[Selection, Selection]:
        """Slices of linear_qkv's weight and bias for some heads (`HeadLayout.rows`), with all hidden channels."""
        channels = self.module.linear_qkv.weight.shape[1]
        return self.module.layout.rows(heads, channels, channels)

    def _columns(self, groups: slice, queries: slice) -> Selection:
        """Slice of linear_proj's weight for some heads (`HeadLayout.columns`), with all hidden channels."""
        channels = self.module.linear_proj.weight.shape[0]
        return self.module.layout.columns(groups, queries, channels, channels)


def _attend(module: ElasticSelfAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Core attention: query [n, B, h, H], key and value [T, B, g, H] -> [n, B, h, H]. mask None: causal to the last key."""
    kind = AttnMaskType.causal if mask is None else AttnMaskType.arbitrary
    return module.core_attention(query, key, value, mask, attn_mask_type=kind).view(*query.shape)


def _attend_up_to(module: ElasticSelfAttention, query: Tensor, key: Tensor, value: Tensor, last_nB: Tensor) -> Tensor:
    """Core attention of queries [n, B, h, H] that see the keys up to a position of their own.

    Queries are computed in up to _PARTS pieces, each with the keys that any of its queries sees. A single piece would compute
    twice as many products.

    Args:
        module: attention.
        query, key, value: heads of the participants, and of all tokens.
        last_nB: position of the last key that each query sees; increasing, except for padding.
    """
    count, length = len(query), len(key)
    step = max(-(-count // _PARTS), _LEAST)
    starts = range(0, count, step)
    # A running maximum, because positions of padding are arbitrary.
    limits = last_nB.amax(1).cummax(0).values[[min(start + step, count) - 1 for start in starts]] + 1
    # Each query's row of the mask is a window of this vector: visible up to its position, hidden after.
    hidden = module.core_attention.as_mask(torch.arange(2 * length, device=last_nB.device) >= length)
    first_Bn = length - 1 - last_nB.T
    out = []
    for start, limit in zip(starts, limits.tolist(), strict=True):
        part = slice(start, start + step)
        rows = first_Bn[:, part]
        mask = hidden.unfold(0, limit, 1).index_select(0, rows.flatten()).view(len(rows), 1, -1, limit)
        out.append(_attend(module, query[part], key[:limit], value[:limit], mask))
    return torch.cat(out) if len(out) > 1 else out[0]


def _cached(module: ElasticSelfAttention, context: BaseInferenceContext, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Append keys and values to Megatron-Core's KV cache of the layer; return (keys, values) of all tokens so far, [T, B, G, H].

    Args:
        module: attention of the layer.
        context: Megatron-Core's static KV cache.
        key, value: keys and values of the new tokens [S, B, G, H].
    """
    memories, start = context.key_value_memory_dict, context.sequence_len_offset
    if module.layer_number not in memories:
        shape = context.max_sequence_length, context.max_batch_size, key.shape[-1], key.dtype
        memories[module.layer_number] = tuple(module._allocate_memory(*shape) for _ in range(2))
    end, batch = start + len(key), key.shape[1]
    for memory, new in zip(memories[module.layer_number], (key, value), strict=True):
        memory[start:end, :batch] = new
    return tuple(memory[:end, :batch] for memory in memories[module.layer_number])


def _normed(norm: torch.nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
