"""Transformer layer that computes with the first hidden channels, or is skipped (LLaMaFlex).

Hidden channels are not divided over tensor-parallel ranks: the first c channels are the same on all ranks.

Shape suffixes: S sequence, B batch, C hidden channels, c channels in use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from flextron_mcore.layers.block import ElasticBlock
from flextron_mcore.layers.state import StateReader
from flextron_mcore.layers.unused import report_unused
from flextron_mcore.space import ElasticSpace


class ElasticTransformerLayer(StateReader, TransformerLayer):
    """Megatron-Core's TransformerLayer on the first c channels of the residual stream, or the identity if it is skipped.

    All modules of the layer share its state (layers/state.py). Blocks of axes that an extension adds (`Axis.module`) follow the
    MLP; the output [S, B, c] of each is added to the residual stream. Megatron-Core's pipeline schedules send tensors of one
    shape, so a stage's first layer receives all C channels, and its last layer returns all C, padded with zeros.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        space = self.mlp.space
        self.added = {axis.block: _built(axis.module, self.config, space) for axis in space.layer_axes if axis.module}
        for name, block in self.added.items():
            self.add_module(name, block)
        for module in self.modules():
            if isinstance(module, StateReader):
                module.holder = self.holder

    @property
    def blocks(self) -> list[ElasticBlock]:
        """Elastic blocks of the layer, one for each layer axis."""
        return [module for module in self.children() if isinstance(module, ElasticBlock)]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any):  # type: ignore[override]
        """(output [S, B, c], context) for the residual stream [S, B, C or c]. A pipeline stage's last layer pads to C with zeros.

        context: the argument `context` of cross-attention, or None.

        Args:
            hidden_states: residual stream; channels beyond the first c are ignored.
            args, kwargs: remaining arguments of Megatron-Core's layer.
        """
        state = self.state
        if state.channels and hidden_states.shape[-1] > state.channels[0]:
            hidden_states = hidden_states[..., : state.channels[0]].contiguous()
        context = kwargs.get("context")
        if state.widths is None or state.widths.executed:
            hidden_states, context = super().forward(hidden_states, *args, **kwargs)
            for block in self.added.values():
                hidden_states = hidden_states + block(hidden_states)
        else:
            hidden_states = report_unused(hidden_states, self.parameters())
        if state.channels and (missing := state.channels[1] - hidden_states.shape[-1]):
            hidden_states = F.pad(hidden_states, (0, missing))
        return hidden_states, context


def _built(path: str, config: TransformerConfig, space: ElasticSpace) -> ElasticBlock:
    """Build the block of an axis that an extension adds.

    Args:
        path: dotted path of the block's class, `Axis.module`.
        config: TransformerConfig of the model.
        space: elastic space of the model.
    """
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)(config, space=space)
