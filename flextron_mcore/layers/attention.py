"""Elastic self-attention, which computes its first KV groups, or the first query heads of every group (Flextron, eq. 2).

    MHA_d(x) = concat(head_1, ..., head_d) W_O[:, :d*H].T        with the weight W_O [C, heads*H] of the output projection

Shape suffixes: S queries, T keys, B batch, C hidden channels in use, G KV groups of this rank, Q query heads of a group, H
channels of a head; g and q are the groups and query heads in use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

from flextron_mcore.checkpoint.sharding import ATTENTION_AXES, deal
from flextron_mcore.config import FlextronError
from flextron_mcore.layers.block import ElasticBlock
from flextron_mcore.layers.compensation import compensated
from flextron_mcore.layers.linear import ElasticRowParallelLinear, Selection
from flextron_mcore.layers.state import StateReader
from flextron_mcore.layers.weighted import mask
from flextron_mcore.space import ElasticSpace, LayerChoice


@dataclass(frozen=True)
class HeadLayout:
    """Numbers of attention heads on one tensor-parallel rank, from which rows and columns of heads in the weights follow.

    Attributes:
        groups: KV groups (G) of the rank.
        queries: query heads (Q) of a group.
        size: channels (H) of a head.
        ranks: number of tensor-parallel ranks.
    """

    groups: int
    queries: int
    size: int
    ranks: int

    @classmethod
    def of(cls, config: TransformerConfig, ranks: int) -> HeadLayout:
        """Layout of the full model's heads on each of `ranks` tensor-parallel ranks.

        Raises FlextronError if the ranks do not divide the KV groups.
        """
        groups = config.num_query_groups
        if groups % ranks:
            raise FlextronError(
                f"model.tensor_model_parallel_size={ranks} does not divide model.num_query_groups={groups}: choose one that does"
            )
        return cls(groups // ranks, config.num_attention_heads // groups, config.kv_channels, ranks)

    def used(self, widths: LayerChoice | None) -> tuple[int, int]:
        """(number of KV groups, number of query heads in each) that a layer computes on this rank. widths: None for all heads."""
        return (self.groups, self.queries) if widths is None else (widths.kv_groups // self.ranks, widths.query_heads_per_group)

    def rows(self, heads: Sequence[tuple[slice, slice]], channels: int, hidden: int, dim: int = 0) -> tuple[Selection, Selection]:
        """Slices of linear_qkv's weight [G*(Q+2)*H, hidden] and of its bias that belong to some heads, as (Selection, Selection).

        Args:
            heads: pairs (KV groups, heads of each of these groups). Heads 0..Q-1 are queries, Q is the key, Q+1 the value.
            channels: number of hidden channels to take, the first ones.
            hidden: number of columns of the weight.
            dim: dimension along which pairs are concatenated, 0 for groups and 1 for heads within a group.
        """
        shape = (self.groups, self.queries + 2, self.size)
        rows = sum(_length(groups, shape[0]) * _length(part, shape[1]) for groups, part in heads) * self.size
        indices = tuple((*index, ..., slice(channels)) for index in heads)
        return Selection((*shape, hidden), indices, (rows, channels), dim), Selection(shape, tuple(heads), (rows,), dim)

    def columns(self, groups: slice, queries: slice, channels: int, hidden: int) -> Selection:
        """Slice of linear_proj's weight [hidden, G*Q*H] that belongs to some heads, as a Selection (layers/linear.py).

        Args:
            groups: KV groups.
            queries: query heads of each of these groups.
            channels: number of hidden channels to take, the first ones.
            hidden: number of rows of the weight.
        """
        shape = (hidden, self.groups, self.queries, self.size)
        count = _length(groups, self.groups) * _length(queries, self.queries)
        return Selection(shape, ((slice(channels), groups, queries),), (channels, count * self.size))


def _length(part: slice, size: int) -> int:
    """Number of entries that a slice takes of a dimension of `size` entries."""
    return len(range(*part.indices(size)))


class ElasticSelfAttention(ElasticBlock, SelfAttention):
    """Megatron-Core's SelfAttention, computed with the first KV groups, or the first query heads of each group.

    Rotary embedding, KV cache, core attention and recomputation are Megatron-Core's. With token routing (a width for every token)
    the layer's `LayerState.routing` computes the whole attention instead.

    Args:
        config: TransformerConfig.
        submodules: specs of projections, core attention and norms.
        layer_number: number of the layer, from 1.
        space: elastic space, whose attention unit, granularity and modulation apply.
        kwargs: remaining arguments of Megatron-Core's SelfAttention.
    """

    axis = "heads"

    def __init__(self, config, submodules, layer_number: int, space: ElasticSpace, **kwargs: Any) -> None:
        super().__init__(config, submodules, layer_number, space=space, **kwargs)
        self.layout = HeadLayout.of(config, self.world_size)
        if space.compensation:
            identity = torch.eye(self.layout.queries, dtype=config.params_dtype, device=self.linear_proj.weight.device)
            self.linear_proj.compensation = identity.repeat(self.layout.groups, 1, 1)

    def unit_mask(self, weights_K: torch.Tensor) -> torch.Tensor:
        """Weight of each query head of this rank [G*Q]: the sum of the weights of the candidates that include it.

        Weighted networks compute all units and multiply them with it, to train a router (layers/weighted.py).

        weights_K: weight of each candidate of the axis.
        """
        if self.space.attention_unit == "kv_group":
            groups = [size // self.layout.queries // self.world_size for size in self.space.heads]
            return mask(weights_K, groups).repeat_interleave(self.layout.queries)
        queries = [size // self.config.num_query_groups for size in self.space.heads]
        return mask(weights_K, queries).repeat(self.layout.groups)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any):  # type: ignore[override]
        """Attention with the heads in use (`LayerState.widths` of the layer): [S, B, C] -> ([S, B, C], bias [C] or None).

        The output is multiplied with the router gate and the modulation gain of the layer's state (`ElasticBlock.scaled`). The
        local backend raises FlextronError for packed sequences and attention biases.

        Args:
            hidden_states: input [S, B, C].
            attention_mask: mask for core attention, or None.
            args, kwargs: remaining arguments of Megatron-Core's attention.
        """
        routing = self.state.routing
        compute = super().forward if routing is None else partial(routing.attention, self)
        return self.scaled(compute(hidden_states, attention_mask, *args, **kwargs))

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projections of the heads in use: [S, B, C] -> query [S, B, g*q, H], key [S, B, g, H], value [S, B, g, H].

        Queries and keys are normalised if the layer has norms for them, and not rotated yet. With sequence parallelism the input
        has this rank's positions, the results all. Raises FlextronError with `output_gate` (attention_output_gate) and without
        `split_qkv` (fused_single_qkv_rope).

        Args:
            hidden_states: input [S, B, C].
            key_value_states: unused, as in Megatron-Core's self-attention.
            output_gate: must be False.
            split_qkv: must be True.
        """
        if output_gate or not split_qkv:
            raise FlextronError(
                "attention_output_gate and fused_single_qkv_rope are not supported by the elastic attention: set both to False"
            )
        layout, layer = self.layout, self.linear_qkv
        groups, queries = layout.used(self.state.widths)
        size, full = layout.size, layout.queries
        if queries == full:
            heads = [(slice(groups), slice(full + 2))]
        else:  # the first query heads, then key and value
            heads = [(slice(groups), slice(queries)), (slice(groups), slice(full, None))]
        (qkv,) = layer(hidden_states, layout.rows(heads, hidden_states.shape[-1], layer.weight.shape[1], dim=1))
        qkv = qkv.view(*qkv.shape[:2], groups, (queries + 2) * size)
        query, key, value = qkv.split([queries * size, size, size], dim=3)
        query = query.reshape(*query.shape[:2], groups * queries, size)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value

    def _allocate_memory(self, inference_max_sequence_length: int, batch_size: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Empty tensor [sequence, batch, g, H] for keys or values in a KV cache, for the groups in use.

        The sub-network must not change while the cache is filled.

        Args:
            inference_max_sequence_length: positions of the cache.
            batch_size: sequences of the cache.
            dim: channels of a head, H.
            dtype: dtype of the cache.
        """
        groups, _ = self.layout.used(self.state.widths)
        shape = (inference_max_sequence_length, batch_size, groups, dim)
        return torch.empty(shape, dtype=dtype, device=self.linear_qkv.weight.device)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """Sharded state with Megatron-Core's keys and shapes.

        With the attention unit `kv_group`, KV group i is stored in bucket i mod `space.granularity`, and buckets follow each
        other, so that tensor-parallel ranks get equal shares of every sub-network (checkpoint/sharding.py).
        """
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.space.attention_unit == "kv_group":
            groups = self.config.num_query_groups
            for name, axis in ATTENTION_AXES.items():
                key = prefix + name
                if key in sharded:
                    sharded[key] = deal(sharded[key], axis, groups, self.space.granularity, self.world_size)
        return sharded


class ElasticOutputProjection(StateReader, ElasticRowParallelLinear):
    """Output projection of ElasticSelfAttention, computed with the heads in use.

    It reads the heads in use from the layer's state, because Megatron-Core's attention passes nothing but the outputs of the
    heads.

    Attributes:
        compensation: T [G, Q, Q] of layers/compensation.py, which multiplies the outputs first; None without space.compensation.
            A buffer: training the weights that follow reaches every function that training T would reach at a given width.
    """

    compensation: torch.Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layout = HeadLayout.of(self.config, self.tp_group.size())
        self.register_buffer("compensation", None)

    def forward(self, input_: torch.Tensor | Sequence[torch.Tensor], *args: Any, mask_h: torch.Tensor | None = None):  # type: ignore[override]
        """Output projection of the heads: [S, B, g*q*H] -> ([S, B, C], bias [C] or None).

        Args:
            input_: outputs of the heads; with `args` a list of them [n, d], one for each slice of the weight.
            args: slices, rows and shape for ElasticRowParallelLinear.forward, from token routing. The layer's state and its
                compensation are then not used.
            mask_h: factor of each head, [heads] or [S, B, heads]; None for the mask in the layer's state.
        """
        if args:
            return super().forward([self.observe(x) for x in input_], *args)
        state, hidden = self.state, self.weight.shape[0]
        groups, queries = self.layout.used(state.widths)
        if mask_h is None:
            mask_h = state.masks.get("heads")
        if self.compensation is not None and queries > 1:  # the first head of a group is as it is
            heads = input_.unflatten(-1, (groups, queries, -1))
            input_ = compensated(heads, self.compensation[:groups, :queries, :queries]).flatten(-3)
        if mask_h is not None:
            heads = input_.unflatten(-1, (mask_h.shape[-1], -1))
            input_ = (heads * mask_h.to(heads.dtype).unsqueeze(-1)).flatten(-2)
        channels = state.channels[0] if state.channels else hidden
        return super().forward(self.observe(input_), self.layout.columns(slice(groups), slice(queries), channels, hidden))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """Sharded state with Megatron-Core's keys and shapes, and the compensation divided by KV groups."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.compensation is not None:
            sharded |= make_sharded_tensors_for_checkpoint(
                {"compensation": self.compensation},
                prefix,
                {"compensation": 0},
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        return sharded

    def observe(self, heads_SBd: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the heads unchanged. Importance scoring and a masked reference in tests replace this method."""
        return heads_SBd


class SDPACoreAttention(MegatronModule):
    """Core attention by torch.nn.functional.scaled_dot_product_attention, for any number of heads.

    The constructor and `forward` take the arguments of Megatron-Core's DotProductAttention. Raises FlextronError for context
    parallelism.

    Args:
        config: TransformerConfig.
        layer_number: number of the layer, from 1, which decides whether it has the sliding window.
        attn_mask_type: mask used when `forward` is given none: causal, or no mask.
        attention_type: unused.
        attention_dropout: dropout probability; None for config.attention_dropout.
        softmax_scale: factor of the scores; None for 1 / sqrt(H).
        cp_comm_type, pg_collection, kwargs: unused.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise FlextronError("model.context_parallel_size > 1 is not supported by the elastic attention: use 1")
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # keys that a query sees, its own included
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    @staticmethod
    def as_mask(hidden: torch.Tensor) -> torch.Tensor:
        """Additive mask: minus infinity where the boolean mask `hidden` is True, else 0. `forward` accepts both kinds."""
        return torch.where(hidden, -torch.inf, 0.0)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params=None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention: query [S, B, heads, H], key and value [T, B, groups, H] -> [S, B, heads*H].

        In a layer with a sliding window of w keys, a query sees only the last w keys up to its own: the window narrows any
        mask, and makes attention causal where there is none.

        Args:
            query, key, value: projections of the heads.
            attention_mask: broadcastable to [B, heads, S, T]: boolean, True where a key is hidden, or additive, minus infinity
                there and 0 elsewhere. None for the mask of `attn_mask_type`.
            attn_mask_type: causal (the last query sees all keys) or no mask; None for the type given to the constructor.
            attention_bias, packed_seq_params: must be None; anything else raises FlextronError.
            kwargs: unused.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise FlextronError("packed sequences and attention biases are not supported by the local backend: pass None")
        length, source = query.shape[0], key.shape[0]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask, causal, windowed = None, False, self.window is not None and source > self.window
        if attention_mask is not None:
            mask = self.as_mask(attention_mask) if attention_mask.dtype == torch.bool else attention_mask
            mask = mask.to(query.dtype)
            if windowed:
                mask = mask + self.as_mask(self._seen(query, source).logical_not()).to(query.dtype)
        elif windowed or (length > 1 and (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal):
            # Megatron-Core decodes a single token with no mask; a window hides earlier keys all the same.
            causal = length == source and not windowed
            mask = None if causal else self._seen(query, source)
        dropout = self.dropout if self.training else 0.0
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return out.permute(2, 0, 1, 3).reshape(length, out.shape[0], -1)

    def _seen(self, query_BhSH: torch.Tensor, source: int) -> torch.Tensor:
        """Causal boolean mask [S, T], True where a query sees a key. The last query sees all; with a window, the last ones."""
        length = query_BhSH.shape[2]
        seen = torch.ones(length, source, dtype=torch.bool, device=query_BhSH.device).tril(source - length)
        return seen if self.window is None else seen.triu(source - length - self.window + 1)
