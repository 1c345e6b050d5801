"""Elastic MLP: the first d neurons (Flextron, eq. 1).

Shape suffixes: S sequence, B batch, C hidden channels in use, F neurons of this rank, f those in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP

from flextron_mcore.checkpoint.sharding import MLP_AXES, deal
from flextron_mcore.layers.dispatch import BlockRouting, Leading, by_level
from flextron_mcore.layers.linear import Selection
from flextron_mcore.layers.modulation import new_modulation, scaled
from flextron_mcore.space import ElasticSpace, LayerChoice


class ElasticMLP(MLP):
    """Megatron-Core's MLP that can compute with a prefix of its neurons.

    `choice` is the LayerChoice in use, None for the full width, unless `routing` chooses token by token; `use_subnetwork` sets
    them, `gate` (layers/gate.py), `share` (layers/modulation.py), and `mask` of this rank's neurons (layers/weighted.py). Each
    tensor-parallel rank holds its neurons in decreasing importance and uses the first `choice.ffn_hidden_size / T` of them.
    """

    def __init__(self, config, submodules, space: ElasticSpace, pg_collection=None, tp_group=None, **kwargs: Any) -> None:
        # Newer Megatron-Core passes pg_collection, is_mtp_layer and name; older passes nothing.
        tp_group = tp_group or (pg_collection.tp if pg_collection is not None else None)
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)
        self.space = space
        self.tensor_parallel_size = self.linear_fc1.tp_group.size()
        self.choice: LayerChoice | None = None
        self.gate: torch.Tensor | None = None
        self.modulation = new_modulation(config, space)
        self.share: float | None = None
        self.routing: BlockRouting | None = None
        self.mask: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Neurons in use on this rank."""
        return self._local(None if self.choice is None else self.choice.ffn_hidden_size)

    def _local(self, neurons: int | None) -> int:
        return (self.config.ffn_hidden_size if neurons is None else neurons) // self.tensor_parallel_size

    def forward(self, hidden_states: torch.Tensor, per_token_scale=None, **kwargs: Any):
        """[S, B, C] -> ([S, B, C], bias or None), the bias being added by the layer's bias-dropout-add."""
        if self.routing is None:
            width, channels = self.width, hidden_states.shape[-1]
            (hidden_SBf,) = self._hidden(self.linear_fc1(hidden_states, *self._rows(width, channels)))
            if self.mask is not None:
                hidden_SBf = hidden_SBf * self.mask.to(hidden_SBf.dtype)
            out, bias = self.linear_fc2(self.observe(hidden_SBf), self._columns(width, channels))
        else:
            out, bias = self._routed(hidden_states)
        out, bias = scaled((out, bias), self.gate, self.modulation, self.share)
        # A view: recomputation would take the parameter itself, as a result, for something that it made, and never end.
        return out, None if bias is None else bias.view_as(bias)

    def _routed(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Each token with the width of its own level (layers/dispatch.py)."""
        levels_SB = self.routing.levels(hidden_states, self.config.sequence_parallel)
        widths, channels = [self._local(size) for size in self.space.ffn_hidden_size], hidden_states.shape[-1]
        if self.routing.masked:
            (hidden_SBF,) = self._hidden(self.linear_fc1(hidden_states, *self._rows(widths[-1], channels)))
            mask_SBK = self.routing.masks(levels_SB)[..., : len(widths)]
            sizes = torch.tensor([high - low for low, high in zip([0, *widths], widths, strict=False)], device=levels_SB.device)
            hidden_SBF = hidden_SBF * mask_SBK.to(hidden_SBF.dtype).repeat_interleave(sizes, -1)
            return self.linear_fc2(self.observe(hidden_SBF), self._columns(widths[-1], channels))
        order, steps = by_level(levels_SB, len(widths))
        edges = [0, *widths]
        ranges = [(edges[step.first], edges[step.last + 1]) for step in steps]
        parts = [part for low, high in ranges for part in self._rows(high, channels, low)]
        counts = [step.count for step in steps]
        products = self.linear_fc1(
            hidden_states, *parts, rows=Leading(order, [count for count in counts for _ in range(self._blocks)])
        )
        columns = [self._columns(high, channels, low) for low, high in ranges]
        hidden = [self.observe(h) for h in self._hidden(products)]
        return self.linear_fc2(hidden, columns, Leading(order, counts), levels_SB.shape)

    @property
    def _blocks(self) -> int:
        """Parts of fc1's weight: gate and up, whose prefixes do not lie together, or one."""
        return 2 if self.config.gated_linear_unit else 1

    def _rows(self, high: int, channels: int, low: int = 0) -> list[tuple[Selection, Selection]]:
        """The selections of fc1's weight and bias for neurons `low` to `high` of this rank, and the first channels."""
        blocks, full, hidden = self._blocks, self._local(None), self.linear_fc1.weight.shape[1]
        indices = [(slice(i, i + 1), slice(low, high)) for i in range(blocks)]
        return [
            (
                Selection((blocks, full, hidden), ((*index, slice(channels)),), (high - low, channels)),
                Selection((blocks, full), (index,), (high - low,)),
            )
            for index in indices
        ]

    def _columns(self, high: int, channels: int, low: int = 0) -> Selection:
        shape = (self.linear_fc2.weight.shape[0], self._local(None))
        return Selection(shape, ((slice(channels), slice(low, high)),), (channels, high - low))

    def _hidden(self, products: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What enters fc2, from fc1's products: one, or gate and up, for each step."""
        activation = self.config.activation_func
        if self._blocks == 1:
            return [activation(product) for product in products]
        return [activation(gate) * up for gate, up in zip(products[::2], products[1::2], strict=True)]

    def observe(self, hidden_SBf: torch.Tensor) -> torch.Tensor:
        """What enters fc2. Importance scoring and the masked oracle of the tests replace this on an instance."""
        return hidden_SBf

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """Vanilla keys and shapes, neurons in dealt order (checkpoint/sharding.py)."""
        sharded = super(MLP, self).sharded_state_dict(prefix, sharded_offsets, metadata)  # not MLP's: it splits gate and up
        gate_and_up = 2 if self.config.gated_linear_unit else 1
        for name, axis in MLP_AXES.items():
            key, blocks = prefix + name, gate_and_up if axis == 0 else 1
            if key in sharded:
                sharded[key] = deal(
                    sharded[key], axis, self.config.ffn_hidden_size, self.space.granularity, self.tensor_parallel_size, blocks
                )
        return sharded
