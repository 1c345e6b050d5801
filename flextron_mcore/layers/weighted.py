"""Network with a weight for every candidate, for training a Gumbel-softmax router (LLaMaFlex).

All units are computed and multiplied with masks made of the weights, so every candidate's weight gets a gradient, chosen or not.
With one-hot weights it computes the same function as the chosen sub-network, at the full model's cost. Only router training uses
it.

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
    """Network with a weight for every candidate of every axis, as float32 leaf tensors on this rank's device; equal on all ranks.

    All units are computed and multiplied with masks, so that every weight gets a gradient (LLaMaFlex). The mask of a unit is the
    sum of the weights of the candidates that include it. The router's weights of a choice sum to 1: one-hot, or relaxed by a
    softmax.

    Attributes:
        hidden_K: weight of each candidate of the hidden size, smallest first.
        layers_L: weight of executing each layer, 0 to 1.
        widths_LK: {layer axis: weights [L, K] of the candidates in each layer, smallest first}.
        share: parameters of the drawn sub-network (the largest weights, also when relaxed) / parameters of the full model, for
            the gain of modulation (layers/block.py); None: no gain.
    """

    hidden_K: Tensor
    layers_L: Tensor
    widths_LK: Mapping[str, Tensor]
    share: float | None = None

    @classmethod
    def of(cls, weights: Sequence[Sequence], device: torch.device) -> WeightedNetwork:
        """Build from nested lists of numbers.

        Args:
            weights: in this order: weights of the hidden sizes [K], weights of the layers [L], for each layer axis (heads, FFN
                neurons) weights of its candidates [L, K], and at the end, if wanted, the float `share` (parameters of the
                sub-network / parameters of the full model).
            device: device of the tensors.
        """
        names = [axis.name for axis in layer_axes()]
        numbers, share = weights[: 2 + len(names)], weights[2 + len(names) :]
        hidden, layers, *widths = (torch.tensor(n, dtype=torch.float32, device=device, requires_grad=True) for n in numbers)
        return cls(hidden, layers, dict(zip(names, widths, strict=True)), *share)

    @property
    def leaves(self) -> list[Tensor]:
        """Weights of the hidden sizes [K], of the layers [L], and of each layer axis [L, K], in this order."""
        return [self.hidden_K, self.layers_L, *self.widths_LK.values()]

    def gradients(self, tokens: float, sequence_parallel: bool) -> list[Tensor]:
        """Gradients of the mean loss with respect to each of `leaves`, after `run_networks`: float64, CPU, same on all ranks.

        Gradients are summed over data-, pipeline- and tensor-parallel ranks; a gradient that every tensor-parallel rank holds
        whole counts once. Call on all ranks.

        Args:
            tokens: number of tokens in the mean loss.
            sequence_parallel: True if tensor-parallel ranks hold different positions, whose gradients add.
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
    """Weight of each unit [U] of an axis: the sum of the weights [K] of the candidates that include the unit.

    sizes: number of units of each candidate on this rank, increasing; the last is U.
    """
    at_least_K = weights_K.flip(0).cumsum(0).flip(0)
    # expand and cat save no tensors for backward. Layers share this mask, and with recomputation each runs backward through it.
    return torch.cat(
        [weight.expand(high - low) for weight, low, high in zip(at_least_K.unbind(), [0, *sizes], sizes, strict=False)]
    )
