"""Elastic self-attention: the first KV groups, or the first query heads of every group (Flextron, eq. 2).

Shape suffixes: S sequence, B batch, C hidden channels in use, G KV groups of this rank, Q query heads of a group, H channels of a
head; small letters for the part in use.
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

from flextron_mcore.checkpoint.sharding import ATTENTION_AXES, deal
from flextron_mcore.config import FlextronError
from flextron_mcore.layers.block import ElasticBlock
from flextron_mcore.layers.linear import ElasticRowParallelLinear, Selection
from flextron_mcore.layers.state import StateReader
from flextron_mcore.layers.weighted import mask
from flextron_mcore.space import ElasticSpace, LayerChoice


@dataclass(frozen=True)
class HeadLayout:
    """How the heads of one rank lie in the weights of its projections: KV groups (G), query heads of each (Q), channels (H)."""

    groups: int
    queries: int
    size: int
    ranks: int

    @classmethod
    def of(cls, config: TransformerConfig, ranks: int) -> HeadLayout:
        """Layout of the full model on each of `ranks` tensor-parallel ranks. Raises FlextronError where groups do not divide."""
        groups = config.num_query_groups
        if groups % ranks:
            raise FlextronError(f"model.tensor_model_parallel_size={ranks} does not divide model.num_query_groups={groups}")
        return cls(groups // ranks, config.num_attention_heads // groups, config.kv_channels, ranks)

    def used(self, widths: LayerChoice | None) -> tuple[int, int]:
        """(KV groups, query heads of each) in use on this rank; None for all."""
        return (self.groups, self.queries) if widths is None else (widths.kv_groups // self.ranks, widths.query_heads_per_group)

    def rows(self, heads: Sequence[tuple[slice, slice]], channels: int, hidden: int, dim: int = 0) -> tuple[Selection, Selection]:
        """Selections of linear_qkv's weight [rows, hidden], with its first channels, and of its bias.

        heads: KV groups, and heads of each of them, of which key and value are the last two (Q and Q + 1).
        """
        shape = (self.groups, self.queries + 2, self.size)
        rows = sum(_length(groups, shape[0]) * _length(part, shape[1]) for groups, part in heads) * self.size
        indices = tuple((*index, ..., slice(channels)) for index in heads)
        return Selection((*shape, hidden), indices, (rows, channels), dim), Selection(shape, tuple(heads), (rows,), dim)

    def columns(self, groups: slice, queries: slice, channels: int, hidden: int) -> Selection:
        """Selection of linear_proj's weight [hidden, columns]: its first channels, for some query heads of some KV groups."""
        shape = (hidden, self.groups, self.queries, self.size)
        count = _length(groups, self.groups) * _length(queries, self.queries)
        return Selection(shape, ((slice(channels), groups, queries),), (channels, count * self.size))


def _length(part: slice, size: int) -> int:
    return len(range(*part.indices(size)))


class ElasticSelfAttention(ElasticBlock, SelfAttention):
    """Megatron-Core's SelfAttention that can compute with a part of its heads.

    Everything between the two projections (rotary embedding, KV cache, core attention, recomputation) is Megatron-Core's, unless
    the layer's state routes token by token.
    """

    axis = "heads"

    def __init__(self, config, submodules, layer_number: int, space: ElasticSpace, **kwargs: Any) -> None:
        super().__init__(config, submodules, layer_number, space=space, **kwargs)
        self.layout = HeadLayout.of(config, self.world_size)

    def unit_mask(self, weights_K: torch.Tensor) -> torch.Tensor:
        """Weights of this rank's query heads [G*Q]."""
        if self.space.attention_unit == "kv_group":
            groups = [size // self.layout.queries // self.world_size for size in self.space.heads]
            return mask(weights_K, groups).repeat_interleave(self.layout.queries)
        queries = [size // self.config.num_query_groups for size in self.space.heads]
        return mask(weights_K, queries).repeat(self.layout.groups)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any):  # type: ignore[override]
        """Megatron-Core's, with gate and gain: [S, B, C] -> ([S, B, C], bias or None)."""
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
        """[S, B, C] -> query [S, B, g*q, H], key [S, B, g, H], value [S, B, g, H]."""
        if output_gate or not split_qkv:
            raise FlextronError("attention_output_gate and fused_single_qkv_rope are not supported by the elastic attention")
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
        """KV cache [sequence, batch, g, H] for the groups in use, which must stay the same while it is filled."""
        groups, _ = self.layout.used(self.state.widths)
        shape = (inference_max_sequence_length, batch_size, groups, dim)
        return torch.empty(shape, dtype=dtype, device=self.linear_qkv.weight.device)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """Vanilla keys and shapes; KV groups in dealt order where they are the elastic unit (checkpoint/sharding.py)."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.space.attention_unit == "kv_group":
            groups = self.config.num_query_groups
            for name, axis in ATTENTION_AXES.items():
                key = prefix + name
                if key in sharded:
                    sharded[key] = deal(sharded[key], axis, groups, self.space.granularity, self.world_size)
        return sharded


class ElasticOutputProjection(StateReader, ElasticRowParallelLinear):
    """Output projection of ElasticSelfAttention.

    It reads the layer's state itself: Megatron-Core's attention calls it with the heads' outputs and nothing else.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layout = HeadLayout.of(self.config, self.tp_group.size())

    def forward(self, input_: torch.Tensor | Sequence[torch.Tensor], *args: Any, mask_h: torch.Tensor | None = None):  # type: ignore[override]
        """[S, B, g*q*H] -> ([S, B, C], bias or None); with more arguments as ElasticRowParallelLinear.

        mask_h: weights of the heads [(S, B,) heads], None for those of the state.
        """
        if args:
            return super().forward([self.observe(x) for x in input_], *args)
        state, hidden = self.state, self.weight.shape[0]
        groups, queries = self.layout.used(state.widths)
        if mask_h is None:
            mask_h = state.masks.get("heads")
        if mask_h is not None:
            heads = input_.unflatten(-1, (mask_h.shape[-1], -1))
            input_ = (heads * mask_h.to(heads.dtype).unsqueeze(-1)).flatten(-2)
        channels = state.channels[0] if state.channels else hidden
        return super().forward(self.observe(input_), self.layout.columns(slice(groups), slice(queries), channels, hidden))

    def observe(self, heads_SBd: torch.Tensor) -> torch.Tensor:
        """The heads' outputs. Importance scoring and the masked oracle of the tests replace this on an instance."""
        return heads_SBd


class SDPACoreAttention(MegatronModule):
    """torch's scaled-dot-product attention behind Megatron-Core's core-attention interface, for any number of heads."""

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
            raise FlextronError("model.context_parallel_size > 1 is not supported by the elastic attention")
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    @staticmethod
    def as_mask(hidden: torch.Tensor) -> torch.Tensor:
        """Numbers to add to scores: minus infinity where a key is hidden. `forward` makes them itself of a boolean mask."""
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
        """query [S, B, heads, H], key and value [T, B, groups, H] -> [S, B, heads*H].

        attention_mask: None for the causal mask (the last query sees all keys), else broadcastable to [B, heads, S, T]: boolean,
        True where attention is *not* allowed, or `as_mask` of that.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise FlextronError("packed sequences and attention biases are not supported by the local backend")
        length, source = query.shape[0], key.shape[0]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask, causal = None, False
        if attention_mask is not None:
            mask = self.as_mask(attention_mask) if attention_mask.dtype == torch.bool else attention_mask
            mask = mask.to(query.dtype)
        elif (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal and length > 1:
            causal = length == source
            if not causal:
                mask = torch.ones(length, source, dtype=torch.bool, device=query.device).tril(source - length)
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
