"""A network whose every candidate has a weight: what a router learns from (LLaMaFlex: Gumbel-softmax masks).

All units are computed and multiplied with masks, so that a gradient tells what each candidate would have changed, chosen or not.
With one weight of 1 on each axis it is that sub-network, computed the expensive way: nothing but a router's training wants it.

Shape suffixes: L layers, K candidates of an axis, U units of this rank, C hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True, eq=False)
class WeightedNetwork:
    """Weights of the candidates, from smallest to largest, and of executing each layer: leaves that gather gradients.

    hidden [K], layers [L], heads [L, K], neurons [L, K]: float32 on this rank's device, the same on all ranks. share: of the
    parameters, a plain number, by which blocks are modulated (layers/modulation.py): of the network that was drawn, also while
    weights lie between candidates.
    """

    hidden_K: Tensor
    layers_L: Tensor
    heads_LK: Tensor
    neurons_LK: Tensor
    share: float | None = None

    @classmethod
    def of(cls, weights: Sequence[Sequence], device: torch.device) -> WeightedNetwork:
        """From plain numbers, in the order of the fields."""
        parts, share = weights[:4], weights[4:]
        return cls(*(torch.tensor(part, dtype=torch.float32, device=device, requires_grad=True) for part in parts), *share)

    def gradients(self, tokens: float, sequence_parallel: bool) -> list[Tensor]:
        """Of the network's mean loss by each of the fields after `run_networks`, the same on all ranks, on the CPU.

        tokens: how many the loss is the mean over. Ranks know their own layers, samples, heads and neurons, and with sequence
        parallelism positions; what is whole on each tensor-parallel rank is counted once.
        """
        ranks, found = parallel_state.get_tensor_model_parallel_world_size(), []
        for leaf, divided in ((self.hidden_K, False), (self.layers_L, False), (self.heads_LK, True), (self.neurons_LK, True)):
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
    """[U]: of each unit the weights of the candidates that have it. sizes: the candidates, in units, increasing, the last U."""
    at_least_K = weights_K.flip(0).cumsum(0).flip(0)
    # Nothing that saves tensors for its backward pass: layers share a mask, and recomputed ones have such a pass each.
    return torch.cat(
        [weight.expand(high - low) for weight, low, high in zip(at_least_K.unbind(), [0, *sizes], sizes, strict=False)]
    )
