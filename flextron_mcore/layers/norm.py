"""Normalisation layers for the local backend, over as many channels as their input has.

Megatron-Core's own torch wrapper refuses sequence parallelism and zero-centred scales; these do not.

Shape suffixes: C hidden channels, c the part in use.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from flextron_mcore.layers.state import StateReader


class ElasticNorm(StateReader):
    """LayerNorm with a bias, RMSNorm without. zero_centered: the scale is 1 + weight."""

    zero_centered = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., c] -> [..., c], with the first c of the scales; or with channels weighed by the state's mask."""
        channels, bias, mask_C = x.shape[-1], self._parameters.get("bias"), self.state.masks.get("hidden_size")
        weight = first(self.weight, channels)
        weight = weight + 1 if self.zero_centered else weight
        if mask_C is not None:
            return masked_norm(x, weight, bias, self.eps, mask_C)
        if bias is None:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], weight, first(bias, channels), self.eps)


class RMSNorm(ElasticNorm, torch.nn.RMSNorm):
    """Root-mean-square normalisation over the last dimension."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self, config)


class LayerNorm(ElasticNorm, torch.nn.LayerNorm):
    """Layer normalisation over the last dimension; zero-centred with `layernorm_zero_centered_gamma`."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma
        if self.zero_centered:
            torch.nn.init.zeros_(self.weight)
        _mark_sequence_parallel(self, config)


def masked_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, mask_C: torch.Tensor
) -> torch.Tensor:
    """[..., C] -> [..., C]: LayerNorm with a bias, RMSNorm without, of channels that count as much as the mask says."""
    channels, x32 = mask_C.sum(), x.float()
    if bias is not None:
        x32 = x32 - (x32 * mask_C).sum(-1, keepdim=True) / channels
    variance = (x32.square() * mask_C).sum(-1, keepdim=True) / channels
    out = x32 * (variance + eps).rsqrt() * weight
    return ((out if bias is None else out + bias) * mask_C).to(x.dtype)


def first(vector_C: torch.Tensor | None, channels: int) -> torch.Tensor | None:
    """The first channels of a parameter (None for an absent one)."""
    return vector_C if vector_C is None or len(vector_C) == channels else vector_C[:channels]


def _mark_sequence_parallel(module: torch.nn.Module, config) -> None:
    """Each rank sees a part of the sequence only: Megatron-Core sums these gradients over tensor-parallel ranks."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel
