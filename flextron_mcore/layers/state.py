"""State of an elastic layer: one frozen `LayerState` says which part of its weights the layer computes with.

All modules of a layer share the state and read it once in a forward pass. Only `flextron_mcore/choosing.py` sets it.

Shape suffixes: S sequence, B batch, C hidden channels, U units of an axis on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from flextron_mcore.space import LayerChoice

Output = tuple[Tensor, Tensor | None]  # a block's output [S, B, C], and the bias [C] that the layer adds to it, if any


class LayerRouting(Protocol):
    """Protocol of token routing in one layer, which computes the layer's blocks with a width for every token."""

    def attention(self, module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Output:
        """Output of the ElasticSelfAttention `module` for the input [S, B, C].

        args, kwargs: remaining arguments of Megatron-Core's attention: mask, KV cache, rotary angles and others. Raises
        FlextronError for arguments that token routing does not support.
        """

    def mlp(self, module: Any, hidden_states: Tensor) -> Output:
        """Output of the ElasticMLP `module` for the input [S, B, C]."""


class TokenRouting(Protocol):
    """Protocol of token routing in a whole model, which gives every layer its LayerRouting."""

    def begin(self, number: int, counted_BS: Tensor | None) -> None:
        """Start a micro-batch: later calls of `layer` route its tokens.

        Args:
            number: number of the micro-batch within the step, over all data-parallel ranks.
            counted_BS: True where a token counts in the loss, None where all tokens do.
        """

    def layer(self, index: int) -> LayerRouting:
        """Routing of one layer for the current micro-batch. index: number of the layer, from 0 over all pipeline stages."""


@dataclass(frozen=True, eq=False)
class LayerState:
    """Part of its weights that one layer computes with, and factors of its blocks' outputs. The default is the full layer.

    Attributes:
        widths: numbers of heads, neurons and other units in use; None for all units.
        channels: (number of channels of the residual stream that the blocks see, number that the layer returns); None for all.
        masks: {axis: factor of each unit [U]}, in a network with a weight for every candidate (layers/weighted.py).
        gates: {axis: router gate, a scalar that multiplies the output of the axis's block} (layers/block.py).
        share: parameters of the sub-network / parameters of the full model, from which blocks with modulation compute their gain;
            None for the full model.
        routing: token routing, which replaces `widths`; None for the same widths for all tokens.
    """

    widths: LayerChoice | None = None
    channels: tuple[int, int] | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    share: float | None = None
    routing: LayerRouting | None = None


FULL = LayerState()


class StateHolder:
    """Holder of a layer's state. All modules of the layer share one holder, so one assignment changes the state of all."""

    def __init__(self) -> None:
        self.state = FULL


class StateReader(nn.Module):
    """Base class of modules that read their layer's state. ElasticTransformerLayer replaces their StateHolder by the layer's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.holder = StateHolder()

    @property
    def state(self) -> LayerState:
        """Current state of the layer. Read it once in a forward pass."""
        return self.holder.state
