"""A network whose every candidate has a weight, from which a router learns (LLaMaFlex: Gumbel-softmax masks).

All units are computed and multiplied with masks, so that a gradient tells what each candidate would have changed, chosen or not.
With one weight of 1 on each axis it is that sub-network, computed the expensive way: nothing but a router's training wants it.

Shape suffixes: L layers, K candidates of an axis, U units of this rank, C hidden channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.axes import layer_axes


@dataclass(frozen=True, eq=False)
class WeightedNetwork:
    """Weights of the candidates, from smallest to largest, and of executing each layer: leaves that gather gradients.

    hidden [K], layers [L], and of each axis of the layers [L, K]: float32 on this rank's device, the same on all ranks. share: of
    the parameters, a plain number, which sets the gain of modulated blocks (layers/block.py): of the network that was drawn, also
    while weights lie between candidates.
    """

    hidden_K: Tensor
    layers_L: Tensor
    widths_LK: Mapping[str, Tensor]
    share: float | None = None

    @classmethod
    def of(cls, weights: Sequence[Sequence], device: torch.device) -> WeightedNetwork:
        """From plain numbers: those of `leaves`, and the share if there is one."""
        names = [axis.name for axis in layer_axes()]
        numbers, share = weights[: 2 + len(names)], weights[2 + len(names) :]
        hidden, layers, *widths = (torch.tensor(n, dtype=torch.float32, device=device, requires_grad=True) for n in numbers)
        return cls(hidden, layers, dict(zip(names, widths, strict=True)), *share)

    @property
    def leaves(self) -> list[Tensor]:
        """Weights of hidden sizes, of layers, and of each axis of the layers."""
        return [self.hidden_K, self.layers_L, *self.widths_LK.values()]

    def gradients(self, tokens: float, sequence_parallel: bool) -> list[Tensor]:
        """Gradients of the network's mean loss by the `leaves` after `run_networks`, the same on all ranks, on the CPU.

        tokens: how many the loss is the mean over. Ranks know their own layers, samples and units, and with sequence parallelism
        positions; what is whole on each tensor-parallel rank is counted once.
        """
        ranks, found = parallel_state.get_tensor_model_parallel_world_size(), []
        parallel = [False, False, *(axis.parallel for axis in layer_axes())]
        for leaf, divided in zip(self.leaves, parallel, strict=True):
            grad = torch.zeros_like(leaf, dtype=torch.float64) if leaf.grad is None else leaf.grad.double()
            grad = grad if divided or sequence_parallel else grad / ranks
            for group in (
                parallel_state.get_data_parallel_group(),
                parallel_state.get_pipeline_model_parallel_group(),
                parallel_state.get_tensor_model_parallel_group(),
            ):
                torch.distributed.all_reduce(grad, group=group)
            found.append((grad / tokens).cpu())
        return found


def mask(weights_K: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum of the weights of the candidates that have a unit: [U]. sizes: the candidates, in units, increasing, the last U."""
    at_least_K = weights_K.flip(0).cumsum(0).flip(0)
    # Nothing that saves tensors for its backward pass: layers share a mask, and recomputed ones have such a pass each.
    return torch.cat(
        [weight.expand(high - low) for weight, low, high in zip(at_least_K.unbind(), [0, *sizes], sizes, strict=False)]
    )
