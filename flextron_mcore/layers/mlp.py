"""Elastic MLP: the first d neurons (Flextron, eq. 1).

Shape suffixes: S sequence, B batch, C hidden channels, F neurons of this rank, f those in use.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP

from flextron_mcore.checkpoint.sharding import MLP_AXES, deal
from flextron_mcore.layers.linear import Selection
from flextron_mcore.space import ElasticSpace, LayerChoice


class ElasticMLP(MLP):
    """Megatron-Core's MLP that can compute with a prefix of its neurons.

    `choice` is the LayerChoice in use, None for the full width; `use_subnetwork` sets it. Each tensor-parallel rank holds its
    neurons in decreasing importance and uses the first `choice.ffn_hidden_size / T` of them.
    """

    def __init__(self, config, submodules, space: ElasticSpace, pg_collection=None, tp_group=None, **kwargs: Any) -> None:
        # Newer Megatron-Core passes pg_collection, is_mtp_layer and name; older passes nothing.
        tp_group = tp_group or (pg_collection.tp if pg_collection is not None else None)
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)
        self.space = space
        self.tensor_parallel_size = self.linear_fc1.tp_group.size()
        self.choice: LayerChoice | None = None

    @property
    def width(self) -> int:
        """Neurons in use on this rank."""
        full = self.config.ffn_hidden_size if self.choice is None else self.choice.ffn_hidden_size
        return full // self.tensor_parallel_size

    def forward(self, hidden_states: torch.Tensor, per_token_scale=None, **kwargs: Any):
        """[S, B, C] -> ([S, B, C], bias or None), the bias being added by the layer's bias-dropout-add."""
        activation, fc2 = self.config.activation_func, self.linear_fc2
        channels, out_channels = hidden_states.shape[-1], fc2.weight.shape[0]
        full, width = self.config.ffn_hidden_size // self.tensor_parallel_size, self.width
        blocks = 2 if self.config.gated_linear_unit else 1
        parts = []
        for i in range(blocks):  # gate and up: their prefixes do not lie together in fc1's weight
            index = (slice(i, i + 1), slice(width))
            weight = Selection((blocks, full, channels), (index,), (width, channels))
            parts.append((weight, Selection((blocks, full), (index,), (width,))))
        products = self.linear_fc1(hidden_states, *parts)
        hidden_SBf = activation(products[0])
        if blocks == 2:
            hidden_SBf = hidden_SBf * products[1]
        hidden_SBf = self.observe(hidden_SBf)
        return fc2(hidden_SBf, Selection((out_channels, full), ((slice(None), slice(width)),), (out_channels, width)))

    def observe(self, hidden_SBf: torch.Tensor) -> torch.Tensor:
        """What enters fc2. Importance scoring and the masked oracle of the tests replace this on an instance."""
        return hidden_SBf

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """Vanilla keys and shapes, neurons in dealt order (checkpoint/sharding.py)."""
        sharded = {}
        for name, module in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            sharded.update(module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        gate_and_up = 2 if self.config.gated_linear_unit else 1
        for name, axis in MLP_AXES.items():
            key, blocks = prefix + name, gate_and_up if axis == 0 else 1
            if key in sharded:
                sharded[key] = deal(
                    sharded[key], axis, self.config.ffn_hidden_size, self.space.granularity, self.tensor_parallel_size, blocks
                )
        return sharded
