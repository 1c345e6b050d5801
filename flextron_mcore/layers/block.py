"""Base class of a layer's blocks (attention, MLP), whose outputs router gates and modulation multiply.

A router gate is a scalar of value 1: its gradient tells a router how much the block matters to the loss. Modulation
("policy-aware modulation", LLaMaFlex) is a learned gain that corrects the scale of the output when the network is smaller. The
gain depends only on the sub-network's parameters as a share of the full model's. So a sub-network is the same function whichever
budget or router chose it, and an export folds the gains into the weights (exports/cut.py).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from flextron_mcore.layers.state import Output, StateReader
from flextron_mcore.layers.unused import report_unused
from flextron_mcore.space import ElasticSpace


class ElasticBlock(StateReader):
    """Block (attention, MLP) of a layer that computes with the first units of its weights, as many as the chosen candidate has.

    With space.modulation the block has a parameter `modulation` [2], initially zero, from which `gain` computes a factor of the
    block's output.

    Attributes:
        axis: name of the layer axis (axes.py) whose units the block has.
        space: elastic space.
        modulation: parameter of the gain; None without space.modulation.
    """

    axis: ClassVar[str]

    def __init__(self, *args: Any, space: ElasticSpace, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.space = space
        self.modulation: torch.nn.Parameter | None = None
        if space.modulation:
            self.modulation = torch.nn.Parameter(torch.zeros(2, dtype=self.config.params_dtype))
            self.modulation.sequence_parallel = self.config.sequence_parallel  # as in layers/norm.py

    def unit_mask(self, weights_K: Tensor) -> Tensor:
        """Weight of each of this rank's units [U]: the sum of the weights of the candidates that include it.

        Weighted networks compute all units and multiply them with it, to train a router (layers/weighted.py). Subclasses
        define it.

        weights_K: weight of each candidate of the axis.
        """
        raise NotImplementedError

    def scaled(self, output: Output) -> Output:
        """Multiply the block's output, value and bias, with the router gate and the gain of modulation, if there are any.

        The gate and the share of parameters, from which the gain is computed, are in the layer's state. Without a share (full
        model) the gain is 1.
        """
        state, (value, bias) = self.state, output
        gate = state.gates.get(self.axis)
        if self.modulation is not None and state.share is None:
            value = report_unused(value, [self.modulation])
        elif self.modulation is not None:
            found = gain(self.modulation, state.share)
            gate = found if gate is None else gate * found
        if gate is None:
            return value, bias
        return value * gate.to(value.dtype), None if bias is None else bias * gate.to(bias.dtype)


def gain(modulation: Tensor, share: float) -> Tensor:
    """Gain [] by which a block's output is multiplied: 1 + (1 - share) * (m0 + m1 * share), m being `modulation` [2].

    share: parameters of the sub-network / parameters of the full model, 0 to 1. The full model's gain is always 1.
    """
    first, second = modulation.float()
    return 1 + (1 - share) * (first + second * share)


def new_gates(networks: int, blocks: int, device: torch.device) -> list[list[Tensor]]:
    """Router gates of value 1, one for each block of each network: scalars that multiply the block's output.

    The gates are leaf tensors. The gradient of a gate, summed over micro-batches, tells a router how much the block matters to
    the loss.

    Args:
        networks: number of networks, the length of the outer list.
        blocks: number of blocks of a network, the length of each inner list.
        device: device of the gates.
    """
    return [[torch.ones((), device=device, requires_grad=True) for _ in range(blocks)] for _ in range(networks)]
