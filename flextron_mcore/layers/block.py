"""Base class of the blocks of a layer: a block computes with as many units of its axis as its layer's state says."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from flextron_mcore.layers.gate import gated
from flextron_mcore.layers.modulation import gain, new_modulation
from flextron_mcore.layers.state import Output, StateReader
from flextron_mcore.layers.unused import unused
from flextron_mcore.space import ElasticSpace


class ElasticBlock(StateReader):
    """A block whose width is a candidate of `axis`, and whose output may have a gate and a gain (layers/modulation.py)."""

    axis: ClassVar[str]

    def __init__(self, *args: Any, space: ElasticSpace, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.space = space
        self.modulation = new_modulation(self.config, space)

    def unit_mask(self, weights_K: Tensor) -> Tensor:
        """Weights [U] of this rank's units, from weights of the axis's candidates (layers/weighted.py)."""
        raise NotImplementedError

    def scaled(self, output: Output) -> Output:
        """The block's output times its gate and its gain."""
        state = self.state
        gate = state.gates.get(self.axis)
        if self.modulation is not None and state.share is None:
            output = unused(output[0], [self.modulation]), output[1]
        elif self.modulation is not None:
            found = gain(self.modulation, state.share)
            gate = found if gate is None else gate * found
        return gated(output, gate)
