"""Normalisation layers for the local backend.

Megatron-Core's own torch wrapper refuses sequence parallelism and zero-centred scales; these do not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square normalisation over the last dimension."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self, config)


class LayerNorm(torch.nn.LayerNorm):
    """Layer normalisation over the last dimension; with `layernorm_zero_centered_gamma` the scale is 1 + weight."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma
        if self.zero_centered:
            torch.nn.init.zeros_(self.weight)
        _mark_sequence_parallel(self, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        return F.layer_norm(x, self.normalized_shape, weight, self.bias, self.eps)


def _mark_sequence_parallel(module: torch.nn.Module, config) -> None:
    """Each rank sees a part of the sequence only: Megatron-Core sums these gradients over tensor-parallel ranks."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel
