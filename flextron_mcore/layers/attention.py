"""Elastic self-attention: the first KV groups, or the first query heads of every group (Flextron, eq. 2).

Shape suffixes: S sequence, B batch, C hidden channels in use, G KV groups of this rank, Q query heads of a group, H channels of a
head; small letters for the part in use.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from flextron_mcore.checkpoint.sharding import ATTENTION_AXES, deal
from flextron_mcore.config import FlextronError
from flextron_mcore.layers.dispatch import BlockRouting
from flextron_mcore.layers.linear import ElasticRowParallelLinear, Selection
from flextron_mcore.layers.modulation import new_modulation, scaled
from flextron_mcore.layers.routed_attention import level_of_heads, masked_keys, routed_attention
from flextron_mcore.space import ElasticSpace, LayerChoice


class ElasticSelfAttention(SelfAttention):
    """Megatron-Core's SelfAttention that can compute with a part of its heads.

    Everything between the two projections (rotary embedding, KV cache, core attention, recomputation) is Megatron-Core's.
    `choice` is the LayerChoice in use, None for all heads, unless `routing` chooses token by token (layers/routed_attention.py);
    `use_subnetwork` sets them, `gate` (layers/gate.py), `share` (layers/modulation.py), and `mask` of this rank's heads
    (layers/weighted.py).
    """

    def __init__(self, config, submodules, layer_number: int, space: ElasticSpace, **kwargs: Any) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        if config.num_query_groups % self.world_size:
            raise FlextronError(
                f"model.tensor_model_parallel_size={self.world_size} does not divide "
                f"model.num_query_groups={config.num_query_groups}"
            )
        self.space = space
        self.choice: LayerChoice | None = None
        self.gate: torch.Tensor | None = None
        self.modulation = new_modulation(config, space)
        self.share: float | None = None
        self.routing: BlockRouting | None = None
        self.mask: torch.Tensor | None = None
        self.linear_proj.part = self.part_of_projection
        self.channels = config.hidden_size

    @property
    def group_size(self) -> int:
        """Query heads that share one key and value head in the full model (Q)."""
        return self.num_attention_heads_per_partition // self.num_query_groups_per_partition

    @property
    def heads(self) -> tuple[int, int]:
        """(KV groups, query heads of each) in use on this rank."""
        if self.choice is None:
            return self.num_query_groups_per_partition, self.group_size
        return self.choice.kv_groups // self.world_size, self.choice.query_heads_per_group

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any):  # type: ignore[override]
        """Megatron-Core's, with gate and gain: [S, B, C] -> ([S, B, C], bias or None)."""
        self.channels = hidden_states.shape[-1]
        output = self._output(hidden_states, attention_mask, *args, **kwargs)
        return scaled(output, self.gate, self.modulation, self.share)

    def _output(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any):
        if self.routing is None:
            self.linear_proj.mask = self.mask
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        levels_SB = self.routing.levels(hidden_states, self.config.sequence_parallel)
        if self.routing.masked:
            mask_SBK, own_mask = self.routing.masks(levels_SB), masked_keys(self, levels_SB)
            self.linear_proj.mask = mask_SBK.index_select(-1, level_of_heads(self, levels_SB.device))
            attention_mask = attention_mask if own_mask is None else own_mask
            out = super().forward(hidden_states, attention_mask, *args, **kwargs)
            self.linear_proj.mask = None
            return out
        if attention_mask is not None:
            raise FlextronError("routing token by token knows the causal mask only: attention_mask must be None")
        return routed_attention(self, hidden_states, levels_SB, *args, **kwargs)

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
        (groups, queries), size = self.heads, self.hidden_size_per_attention_head
        layer = self.linear_qkv
        hidden, channels = layer.weight.shape[1], hidden_states.shape[-1]
        full = (self.num_query_groups_per_partition, self.group_size + 2, size)
        if queries == self.group_size:
            indices = ((slice(groups),),)
        else:  # the first query heads, then key and value
            indices = ((slice(groups), slice(queries)), (slice(groups), slice(self.group_size, None)))
        rows = groups * (queries + 2) * size
        within = tuple((*index, ..., slice(channels)) for index in indices)
        weight = Selection((*full, hidden), within, (rows, channels), dim=1)
        (mixed,) = layer(hidden_states, (weight, Selection(full, indices, (rows,), dim=1)))
        mixed = mixed.view(*mixed.shape[:2], groups, (queries + 2) * size)
        query, key, value = mixed.split([queries * size, size, size], dim=3)
        query = query.reshape(*query.shape[:2], groups * queries, size)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value

    def _allocate_memory(self, inference_max_sequence_length: int, batch_size: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """KV cache [sequence, batch, g, H] for the groups in use, which must stay the same while it is filled."""
        shape = (inference_max_sequence_length, batch_size, self.heads[0], dim)
        return torch.empty(shape, dtype=dtype, device=self.linear_qkv.weight.device)

    def part_of_projection(self) -> Selection:
        """The columns of the output projection that belong to the heads in use."""
        groups, queries = self.heads
        return self.projection(slice(groups), slice(queries))

    def projection(self, groups: slice, queries: slice) -> Selection:
        """The columns of the output projection for query heads `queries` of each of the groups `groups` of this rank."""
        size, rows = self.hidden_size_per_attention_head, self.linear_proj.weight.shape[0]
        shape = (rows, self.num_query_groups_per_partition, self.group_size, size)
        count = len(range(*groups.indices(shape[1]))) * len(range(*queries.indices(shape[2])))
        return Selection(shape, ((slice(self.channels), groups, queries),), (self.channels, count * size))

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


class ElasticOutputProjection(ElasticRowParallelLinear):
    """The output projection of ElasticSelfAttention, which chooses the heads: it sets `part`, and `mask` [(S, B,) heads]."""

    mask: torch.Tensor | None = None

    def forward(self, input_: Any, *args: Any):  # type: ignore[override]
        """[S, B, g*q*H] -> ([S, B, C], bias or None); with more arguments as ElasticRowParallelLinear."""
        if args:
            return super().forward([self.observe(x) for x in input_], *args)
        if self.mask is not None:
            heads = input_.unflatten(-1, (self.mask.shape[-1], -1))
            input_ = (heads * self.mask.to(heads.dtype).unsqueeze(-1)).flatten(-2)
        return super().forward(self.observe(input_), self.part())

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
        """What is added to scores: minus infinity where a key is hidden. `forward` takes either, and makes this of the other."""
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
