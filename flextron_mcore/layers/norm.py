"""LayerNorm and RMSNorm of the backend "local", over all channels of the input, which may be the first ones of the model's.

Megatron-Core's torch wrapper refuses sequence parallelism and zero-centred scales. These classes support both.

Shape suffixes: C hidden channels, c channels in use.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from flextron_mcore.layers.state import StateReader


class ElasticNorm(StateReader):
    """Base of the norms: LayerNorm if the module has a bias, else RMSNorm. With `zero_centered` the scale is 1 + weight."""

    zero_centered = False
    of_channels = True  # False for norms of single heads, which a mask of the hidden channels does not concern

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension: [..., c] -> [..., c], with the first c scales and shifts.

        In a network with a weight for every candidate (layers/weighted.py) the layer's state has a mask of the channels, which
        weights them in the statistics and multiplies the result.
        """
        channels, bias = x.shape[-1], self._parameters.get("bias")
        mask_C = self.state.masks.get("hidden_size") if self.of_channels else None
        weight = first_channels(self.weight, channels)
        weight = weight + 1 if self.zero_centered else weight
        if mask_C is not None:
            return masked_norm(x, weight, bias, self.eps, mask_C)
        if bias is None:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], weight, first_channels(bias, channels), self.eps)


class RMSNorm(ElasticNorm, torch.nn.RMSNorm):
    """Root-mean-square normalisation over the last dimension.

    Args:
        config: TransformerConfig.
        hidden_size: full number of channels.
        eps: added to the mean square.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self, config)


class LayerNorm(ElasticNorm, torch.nn.LayerNorm):
    """Layer normalisation over the last dimension; zero-centred with `layernorm_zero_centered_gamma`.

    Args:
        config: TransformerConfig.
        hidden_size: full number of channels.
        eps: added to the variance.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma
        if self.zero_centered:
            torch.nn.init.zeros_(self.weight)
        _mark_sequence_parallel(self, config)


class RMSHeadNorm(RMSNorm):
    """Root-mean-square normalisation of each head's query or key: [..., H] -> [..., H], with one scale for all heads."""

    of_channels = False


def masked_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, mask_C: torch.Tensor
) -> torch.Tensor:
    """LayerNorm (with a bias) or RMSNorm (without) in which every channel has a weight: [..., C] -> [..., C].

    Args:
        x: input; the result has its dtype, computed in float32.
        weight: scales [C].
        bias: shifts [C], None for RMSNorm.
        eps: added to the variance, for RMSNorm to the mean square.
        mask_C: weight of each channel in the statistics, which also multiplies the result. The sum of the weights is the number
            of channels in use.
    """
    channels, x32 = mask_C.sum(), x.float()
    if bias is not None:
        x32 = x32 - (x32 * mask_C).sum(-1, keepdim=True) / channels
    variance = (x32.square() * mask_C).sum(-1, keepdim=True) / channels
    out = x32 * (variance + eps).rsqrt() * weight
    return ((out if bias is None else out + bias) * mask_C).to(x.dtype)


def first_channels(vector_C: torch.Tensor | None, channels: int) -> torch.Tensor | None:
    """First `channels` entries of a parameter; None for an absent one."""
    return vector_C if vector_C is None or len(vector_C) == channels else vector_C[:channels]


def _mark_sequence_parallel(module: torch.nn.Module, config) -> None:
    """Copy `config.sequence_parallel` to the parameters.

    If it is True, Megatron-Core sums their gradients over tensor-parallel ranks, because each sees only a part of the sequence.
    """
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel
