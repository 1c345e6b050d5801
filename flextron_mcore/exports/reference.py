"""A forward pass of what an export's files hold, in fp32, for formats whose engines need a GPU or a library of their own.

Shape suffixes: B batch, S sequence, C hidden channels, N heads, H channels of a head, I half of them, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Decoder:
    """A model in files.

    tensor: a tensor in fp32 by its role, None for one that is not there. Roles: `words`, `positions`, `final_norm`, `output`, and
    of layer i `i.attention_norm`, `i.query`, `i.key`, `i.value`, `i.projection`, `i.mlp_norm`, `i.gate`, `i.up`, `i.down`, each
    with `.weight` or `.bias`; an MLP without a gate has the one that is activated as its `gate`. frequency_I: of rotary
    positions, None for learned ones. neighbours: rotation turns channels 2i and 2i + 1, not i and i + H / 2.
    """

    tensor: Callable[[str], torch.Tensor | None]
    layers: int
    head_size: int
    epsilon: float
    rms_norm: bool
    activation: Callable[[torch.Tensor], torch.Tensor]
    frequency_I: torch.Tensor | None
    neighbours: bool = False

    def linear(self, x: torch.Tensor, role: str) -> torch.Tensor:
        """`x` times a weight, plus its bias if there is one."""
        return F.linear(x, self.tensor(f"{role}.weight"), self.tensor(f"{role}.bias"))

    def norm(self, x: torch.Tensor, role: str) -> torch.Tensor:
        """RMSNorm or LayerNorm over the channels."""
        weight_C = self.tensor(f"{role}.weight")
        if self.rms_norm:
            return F.rms_norm(x, weight_C.shape, weight_C, self.epsilon)
        return F.layer_norm(x, weight_C.shape, weight_C, self.tensor(f"{role}.bias"), self.epsilon)

    @torch.no_grad()
    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V]. The tensors of one linear layer are in memory at a time."""
        x_BSC = self.tensor("words.weight")[tokens_BS]
        if self.frequency_I is None:
            x_BSC = x_BSC + self.tensor("positions.weight")[: tokens_BS.shape[1]]
        for i in range(self.layers):
            x_BSC = x_BSC + self._attention(self.norm(x_BSC, f"{i}.attention_norm"), i)
            y_BSC = self.norm(x_BSC, f"{i}.mlp_norm")
            inner = self.activation(self.linear(y_BSC, f"{i}.gate"))
            if self.tensor(f"{i}.up.weight") is not None:
                inner = inner * self.linear(y_BSC, f"{i}.up")
            x_BSC = x_BSC + self.linear(inner, f"{i}.down")
        return self.linear(self.norm(x_BSC, "final_norm"), "output")

    def _attention(self, x_BSC: torch.Tensor, layer: int) -> torch.Tensor:
        query, key, value = (
            self.linear(x_BSC, f"{layer}.{part}").unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        query, key = self._rotated(query), self._rotated(key)
        context_BNSH = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.linear(context_BNSH.transpose(1, 2).flatten(2), f"{layer}.projection")

    def _rotated(self, x_BNSH: torch.Tensor) -> torch.Tensor:
        if self.frequency_I is None:
            return x_BNSH
        angle_SI = torch.outer(torch.arange(x_BNSH.shape[-2], dtype=torch.float64), self.frequency_I)
        cos_SI, sin_SI = angle_SI.cos().float(), angle_SI.sin().float()
        a, b = x_BNSH.unflatten(-1, (-1, 2)).unbind(-1) if self.neighbours else x_BNSH.chunk(2, -1)
        turned = a * cos_SI - b * sin_SI, b * cos_SI + a * sin_SI
        return torch.stack(turned, -1).flatten(-2) if self.neighbours else torch.cat(turned, -1)


def frequencies(base: float, head_size: int) -> torch.Tensor:
    """Angles [I] between two positions, in fp64."""
    return float(base) ** -(torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)


def llama3_factors(scaling: Mapping[str, Any], frequency_I: torch.Tensor) -> torch.Tensor:
    """Divisors [I] of the frequencies in Llama 3.1's scaling.

    Waves longer than a context of original_max_position_embeddings are slowed by `factor`, short ones are kept, and in between
    the frequency is interpolated. Source: Llama 3.1's `apply_scaling`.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns_I = scaling["original_max_position_embeddings"] * frequency_I / (2 * math.pi)  # of each within the original context
    kept_I = ((turns_I - low) / (high - low)).clamp(0, 1) if high > low else (turns_I >= high).double()
    return 1 / (kept_I + (1 - kept_I) / scaling["factor"])
