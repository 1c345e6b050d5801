"""Elastic MLP: the first d neurons (Flextron, eq. 1).

Shape suffixes: S sequence, B batch, C hidden channels in use, F neurons of this rank, f those in use.
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
    """Megatron-Core's MLP that can compute with a prefix of its neurons.

    Each tensor-parallel rank holds its neurons in decreasing importance and uses the first `ffn_hidden_size / T` of them.
    """

    axis = "ffn_hidden_size"

    def __init__(self, config, submodules, space: ElasticSpace, pg_collection=None, tp_group=None, **kwargs: Any) -> None:
        # Newer Megatron-Core passes pg_collection, is_mtp_layer and name; older passes nothing.
        tp_group = tp_group or (pg_collection.tp if pg_collection is not None else None)
        super().__init__(config, submodules, space=space, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)
        self.tensor_parallel_size = self.linear_fc1.tp_group.size()

    def local(self, neurons: int | None) -> int:
        """Neurons of this rank, None for all."""
        return (self.config.ffn_hidden_size if neurons is None else neurons) // self.tensor_parallel_size

    def used(self, widths: LayerChoice | None) -> int:
        """Neurons in use on this rank; None for all."""
        return self.local(None if widths is None else widths.ffn_hidden_size)

    def unit_mask(self, weights_K: torch.Tensor) -> torch.Tensor:
        """Weights of this rank's neurons [F]."""
        return mask(weights_K, [self.local(size) for size in self.space.ffn_hidden_size])

    def forward(self, hidden_states: torch.Tensor, per_token_scale=None, **kwargs: Any):
        """[S, B, C] -> ([S, B, C], bias or None), the bias being added by the layer's bias-dropout-add."""
        state = self.state
        if state.routing is not None:
            output = state.routing.mlp(self, hidden_states)
        else:
            output = self.prefix(hidden_states, self.used(state.widths), state.masks.get(self.axis))
        out, bias = self.scaled(output)
        # A view: recomputation would take the parameter itself, as a result, for something that it made, and never end.
        return out, None if bias is None else bias.view_as(bias)

    def prefix(self, hidden_states: torch.Tensor, width: int, mask_F: torch.Tensor | None = None) -> Output:
        """The MLP with the first `width` neurons of this rank, each times its weight in the mask [(S, B,) f]."""
        channels = hidden_states.shape[-1]
        (hidden_SBf,) = self.activated(self.linear_fc1(hidden_states, *self.rows(width, channels)))
        if mask_F is not None:
            hidden_SBf = hidden_SBf * mask_F.to(hidden_SBf.dtype)
        return self.linear_fc2(self.observe(hidden_SBf), self.columns(width, channels))

    @property
    def parts(self) -> int:
        """Parts of fc1's weight: gate and up, whose prefixes do not lie together, or one."""
        return 2 if self.config.gated_linear_unit else 1

    def rows(self, high: int, channels: int, low: int = 0) -> list[tuple[Selection, Selection]]:
        """The selections of fc1's weight and bias for neurons `low` to `high` of this rank, and the first channels."""
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
        """The selection of fc2's weight for neurons `low` to `high` of this rank, and the first channels."""
        shape = (self.linear_fc2.weight.shape[0], self.local(None))
        return Selection(shape, ((slice(channels), slice(low, high)),), (channels, high - low))

    def activated(self, products: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Inputs of fc2 from products of fc1: each of one, or of gate and up."""
        activation = self.config.activation_func
        if self.parts == 1:
            return [activation(product) for product in products]
        return [activation(gate) * up for gate, up in zip(products[::2], products[1::2], strict=True)]

    def observe(self, hidden_SBf: torch.Tensor) -> torch.Tensor:
        """Input of fc2. Importance scoring and the masked oracle of the tests replace this on an instance."""
        return hidden_SBf

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """Vanilla keys and shapes, neurons in dealt order (checkpoint/sharding.py)."""
        sharded = super(MLP, self).sharded_state_dict(prefix, sharded_offsets, metadata)  # not MLP's: it splits gate and up
        for name, axis in MLP_AXES.items():
            key, blocks = prefix + name, self.parts if axis == 0 else 1
            if key in sharded:
                sharded[key] = deal(
                    sharded[key], axis, self.config.ffn_hidden_size, self.space.granularity, self.tensor_parallel_size, blocks
                )
        return sharded
