"""Elastic MLP, which computes its first d neurons (Flextron, eq. 1).

    MLP_d(x) = act(x W1[:d].T) W2[:, :d].T        with W1 [D, C] of fc1 and W2 [C, D] of fc2

Shape suffixes: S sequence, B batch, C hidden channels in use, F neurons of this rank, f neurons in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP

from flextron_mcore.checkpoint.sharding import MLP_AXES, deal
from flextron_mcore.layers.block import ElasticBlock
from flextron_mcore.layers.linear import Selection
from flextron_mcore.layers.state import Output
from flextron_mcore.layers.weighted import mask
from flextron_mcore.space import ElasticSpace, LayerChoice


class ElasticMLP(ElasticBlock, MLP):
    """Megatron-Core's MLP, computed with its first neurons.

    For a candidate of d neurons, each of T tensor-parallel ranks computes the first d / T of its own neurons. They are the most
    important ones if the checkpoint is sorted (`flextron importance`).

    Args:
        config: TransformerConfig.
        submodules: specs of fc1 and fc2.
        space: elastic space, whose modulation and granularity apply.
        pg_collection: process groups, from Megatron-Core 0.19.
        tp_group: tensor-parallel group; None for the group in pg_collection, or the global one.
    """

    axis = "ffn_hidden_size"

    def __init__(self, config, submodules, space: ElasticSpace, pg_collection=None, tp_group=None, **kwargs: Any) -> None:
        # Megatron-Core 0.19 passes pg_collection, is_mtp_layer and name; 0.16 passes none of them.
        tp_group = tp_group or (pg_collection.tp if pg_collection is not None else None)
        super().__init__(config, submodules, space=space, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)
        self.tensor_parallel_size = self.linear_fc1.tp_group.size()

    def local(self, neurons: int | None) -> int:
        """Number of this rank's neurons out of `neurons` of all tensor-parallel ranks together. neurons: None for all."""
        return (self.config.ffn_hidden_size if neurons is None else neurons) // self.tensor_parallel_size

    def used(self, widths: LayerChoice | None) -> int:
        """Number of neurons that the layer computes on this rank. widths: sizes of the layer; None for all neurons."""
        return self.local(None if widths is None else widths.ffn_hidden_size)

    def unit_mask(self, weights_K: torch.Tensor) -> torch.Tensor:
        """Weight of each of this rank's neurons [F]: the sum of the weights of the candidates that include it.

        Weighted networks compute all units and multiply them with it, to train a router (layers/weighted.py).

        weights_K: weight of each candidate of the axis.
        """
        return mask(weights_K, [self.local(size) for size in self.space.ffn_hidden_size])

    def forward(self, hidden_states: torch.Tensor, per_token_scale=None, **kwargs: Any):
        """MLP with the neurons in use (`LayerState.widths` of the layer): [S, B, C] -> ([S, B, C], bias [C] or None).

        The layer adds the bias. The output is multiplied with the router gate and the modulation gain of the layer's state
        (`ElasticBlock.scaled`). per_token_scale, kwargs: unused.
        """
        state = self.state
        if state.routing is not None:
            output = state.routing.mlp(self, hidden_states)
        else:
            output = self.prefix(hidden_states, self.used(state.widths), state.masks.get(self.axis))
        out, bias = self.scaled(output)
        # A view: activation recomputation takes every tensor that a block returns for a result of the block's own graph. With the
        # parameter itself its backward pass would never end.
        return out, None if bias is None else bias.view_as(bias)

    def prefix(self, hidden_states: torch.Tensor, width: int, mask_F: torch.Tensor | None = None) -> Output:
        """MLP with the first neurons of this rank: [S, B, C] -> ([S, B, C], bias [C] or None), before gate and gain (`scaled`).

        Args:
            hidden_states: input [S, B, C].
            width: number f of this rank's neurons.
            mask_F: factor of each neuron's activation, [f] or [S, B, f]; None for 1.
        """
        channels = hidden_states.shape[-1]
        (hidden_SBf,) = self.activated(self.linear_fc1(hidden_states, *self.rows(width, channels)))
        if mask_F is not None:
            hidden_SBf = hidden_SBf * mask_F.to(hidden_SBf.dtype)
        return self.linear_fc2(self.observe(hidden_SBf), self.columns(width, channels))

    @property
    def parts(self) -> int:
        """Number of projections stacked in fc1's weight: 2 for a gated MLP (gate, then up), else 1."""
        return 2 if self.config.gated_linear_unit else 1

    def rows(self, high: int, channels: int, low: int = 0) -> list[tuple[Selection, Selection]]:
        """Slices of fc1's weight and bias for a range of neurons, as pairs of Selection (layers/linear.py).

        One pair, or for a gated MLP two: of the gate projection and of the up projection.

        Args:
            high: end of the range of this rank's neurons, exclusive.
            channels: number of hidden channels, the first ones.
            low: start of the range.
        """
        blocks, full, hidden = self.parts, self.local(None), self.linear_fc1.weight.shape[1]
        indices = [(slice(i, i + 1), slice(low, high)) for i in range(blocks)]
        return [
            (
                Selection((blocks, full, hidden), ((*index, slice(channels)),), (high - low, channels)),
                Selection((blocks, full), (index,), (high - low,)),
            )
            for index in indices
        ]

    def columns(self, high: int, channels: int, low: int = 0) -> Selection:
        """Slice of fc2's weight [C, F] for a range of neurons, as a Selection (layers/linear.py): rows of the first channels.

        Args:
            high: end of the range of this rank's neurons, exclusive.
            channels: number of hidden channels, the first ones.
            low: start of the range.
        """
        shape = (self.linear_fc2.weight.shape[0], self.local(None))
        return Selection(shape, ((slice(channels), slice(low, high)),), (channels, high - low))

    def activated(self, products: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Inputs of fc2: act(product) of each product of fc1; for a gated MLP act(gate) * up of each pair of products."""
        activation = self.config.activation_func
        if self.parts == 1:
            return [activation(product) for product in products]
        return [activation(gate) * up for gate, up in zip(products[::2], products[1::2], strict=True)]

    def observe(self, hidden_SBf: torch.Tensor) -> torch.Tensor:
        """Return the input of fc2 unchanged. Importance scoring and a masked reference in tests replace this method."""
        return hidden_SBf

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """Sharded state with Megatron-Core's keys and shapes.

        Neuron i is stored in bucket i mod `space.granularity`, and buckets follow each other, so that tensor-parallel ranks get
        equal shares of every sub-network (checkpoint/sharding.py).
        """
        sharded = super(MLP, self).sharded_state_dict(prefix, sharded_offsets, metadata)  # MLP's own splits gate and up
        for name, axis in MLP_AXES.items():
            key, blocks = prefix + name, self.parts if axis == 0 else 1
            if key in sharded:
                sharded[key] = deal(
                    sharded[key], axis, self.config.ffn_hidden_size, self.space.granularity, self.tensor_parallel_size, blocks
                )
        return sharded
