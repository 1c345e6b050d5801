"""A Transformer layer of an elastic network: the hidden size in use, and layers that are not executed (LLaMaFlex).

Hidden channels are not divided over tensor-parallel ranks, so the first c of them are the same on all.

Shape suffixes: S sequence, B batch, C hidden channels, c the part in use.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from flextron_mcore.layers.block import ElasticBlock
from flextron_mcore.layers.state import StateReader
from flextron_mcore.layers.unused import unused


class ElasticTransformerLayer(StateReader, TransformerLayer):
    """Megatron-Core's TransformerLayer on the first channels of the residual stream; or nothing, where it is skipped.

    All modules of the layer share its state. Blocks of added axes (`module` in axes.py, made of the configuration and the space)
    follow the MLP: each returns what it adds to the residual stream [S, B, c]. The input of a pipeline stage's first layer is as
    wide as the model, and so must be the output of its last one: Megatron-Core's schedules send one shape.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        space = self.mlp.space
        self.added = {axis.block: axis.module(self.config, space=space) for axis in space.layer_axes if axis.module}
        for name, block in self.added.items():
            self.add_module(name, block)
        for module in self.modules():
            if isinstance(module, StateReader):
                module.holder = self.holder

    @property
    def blocks(self) -> list[ElasticBlock]:
        """The blocks of the layer, each of an axis of its own."""
        return [module for module in self.children() if isinstance(module, ElasticBlock)]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any):  # type: ignore[override]
        """[S, B, C or c] -> ([S, B, c, or C with zeros], context)."""
        state = self.state
        if state.channels and hidden_states.shape[-1] > state.channels[0]:
            hidden_states = hidden_states[..., : state.channels[0]].contiguous()
        context = kwargs.get("context")
        if state.widths is None or state.widths.executed:
            hidden_states, context = super().forward(hidden_states, *args, **kwargs)
            for block in self.added.values():
                hidden_states = hidden_states + block(hidden_states)
        else:
            hidden_states = unused(hidden_states, self.parameters())
        if state.channels and (missing := state.channels[1] - hidden_states.shape[-1]):
            hidden_states = F.pad(hidden_states, (0, missing))
        return hidden_states, context
