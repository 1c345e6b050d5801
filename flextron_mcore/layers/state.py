"""The choice that a layer computes: one frozen `LayerState`, which all modules of the layer read once in a forward pass.

`flextron_mcore/choosing.py` sets and restores it; nothing else does.

Shape suffixes: S sequence, B batch, C hidden channels, U units of an axis on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from flextron_mcore.space import LayerChoice

Output = tuple[Tensor, Tensor | None]  # of a block: [S, B, C] and the bias [C] that the layer adds, if any


class LayerRouting(Protocol):
    """Token routing of one layer: computes its blocks with a choice for every token."""

    def attention(self, module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Output:
        """Output of the ElasticSelfAttention `module`; arguments as its forward."""

    def mlp(self, module: Any, hidden_states: Tensor) -> Output:
        """Output of the ElasticMLP `module`."""


class TokenRouting(Protocol):
    """Token routing of a whole model."""

    def begin(self, number: int, counted_BS: Tensor | None) -> None:
        """Start a micro-batch, before `layer`: its number among all ranks' of a step, and which of its tokens count."""

    def layer(self, index: int) -> LayerRouting:
        """Routing of a layer (counted from 0 over all pipeline stages) for the micro-batch that was begun."""


@dataclass(frozen=True, eq=False)
class LayerState:
    """The choice of one layer. The default is the full layer.

    widths: the sizes in use, None for all units. channels: of the residual stream, (that the blocks see, that the layer returns),
    None for all. masks: by axis, a weight for each unit [U] (layers/weighted.py). gates: by axis, a scalar that the output of the
    axis's block is multiplied with (layers/block.py). share: of the network's parameters in the full model's, which sets the gain
    of modulated blocks; None for the full model. routing: chooses the widths token by token instead.
    """

    widths: LayerChoice | None = None
    channels: tuple[int, int] | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    share: float | None = None
    routing: LayerRouting | None = None


FULL = LayerState()


class StateHolder:
    """Shared by all modules of a layer, so that setting its one attribute is a choice for all of them."""

    def __init__(self) -> None:
        self.state = FULL


class StateReader(nn.Module):
    """Base class of modules that read their layer's state. `ElasticTransformerLayer` lets them share its holder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.holder = StateHolder()

    @property
    def state(self) -> LayerState:
        """The choice in use. Read it once in a forward pass."""
        return self.holder.state
