"""Base class of a layer's blocks: a block computes as many units of its axis as the layer's state says.

Its output may be scaled by a gate, a scalar of value 1 whose gradient tells routers what the block is worth, and by a gain:
policy-aware modulation (LLaMaFlex). A block computed with a part of its units, among others that are, adds something smaller or
larger than the full one does; two numbers a block let it make up for that at each size. Only the share of the parameters counts,
so a network is the same function whatever budget or router chose it, and its gains fold into its weights (exports/cut.py).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from flextron_mcore.layers.state import Output, StateReader
from flextron_mcore.layers.unused import unused
from flextron_mcore.space import ElasticSpace


class ElasticBlock(StateReader):
    """A block whose width is a candidate of `axis`. space.modulation gives it a parameter [2], with which every gain is 1."""

    axis: ClassVar[str]

    def __init__(self, *args: Any, space: ElasticSpace, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.space = space
        self.modulation: torch.nn.Parameter | None = None
        if space.modulation:
            self.modulation = torch.nn.Parameter(torch.zeros(2, dtype=self.config.params_dtype))
            self.modulation.sequence_parallel = self.config.sequence_parallel  # as in layers/norm.py

    def unit_mask(self, weights_K: Tensor) -> Tensor:
        """Weights [U] of this rank's units, from weights of the axis's candidates (layers/weighted.py)."""
        raise NotImplementedError

    def scaled(self, output: Output) -> Output:
        """The block's output times its gate and its gain."""
        state, (value, bias) = self.state, output
        gate = state.gates.get(self.axis)
        if self.modulation is not None and state.share is None:
            value = unused(value, [self.modulation])
        elif self.modulation is not None:
            found = gain(self.modulation, state.share)
            gate = found if gate is None else gate * found
        if gate is None:
            return value, bias
        return value * gate.to(value.dtype), None if bias is None else bias * gate.to(bias.dtype)


def gain(modulation: Tensor, share: float) -> Tensor:
    """The gain [] of a block in a network with `share` (0..1) of the full model's parameters; always 1 for the full model."""
    first, second = modulation.float()
    return 1 + (1 - share) * (first + second * share)


def new_gates(networks: int, blocks: int, device: torch.device) -> list[list[Tensor]]:
    """A gate for each block of each network: leaves, so that their gradients gather over micro-batches."""
    return [[torch.ones((), device=device, requires_grad=True) for _ in range(blocks)] for _ in range(networks)]
