"""A Transformer layer of an elastic network: the hidden size in use, and layers that are not executed (LLaMaFlex).

Hidden channels are not divided over tensor-parallel ranks, so the first c of them are the same on all.

Shape suffixes: S sequence, B batch, C hidden channels, c the part in use.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from flextron_mcore.layers.unused import unused


class ElasticTransformerLayer(TransformerLayer):
    """Megatron-Core's TransformerLayer on the first channels of the residual stream; or nothing, where it is skipped.

    channels: (of what its blocks see, of what it returns), None for all; `use_subnetwork` sets it. What reaches the first layer
    of a pipeline stage is as wide as the model, and so must be what leaves its last one: Megatron-Core's schedules send one
    shape.
    """

    channels: tuple[int, int] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any):  # type: ignore[override]
        """[S, B, C or c] -> ([S, B, c, or C with zeros], context)."""
        if self.channels and hidden_states.shape[-1] > self.channels[0]:
            hidden_states = hidden_states[..., : self.channels[0]].contiguous()
        choice = self.mlp.choice
        context = kwargs.get("context")
        if choice is None or choice.executed:
            hidden_states, context = super().forward(hidden_states, *args, **kwargs)
        else:
            hidden_states = unused(hidden_states, self.parameters())
        if self.channels and (missing := self.channels[1] - hidden_states.shape[-1]):
            hidden_states = F.pad(hidden_states, (0, missing))
        return hidden_states, context
