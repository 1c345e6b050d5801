"""Forward pass in fp32 of a model in an export's files, for formats whose engines need a GPU or a library of their own.

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
    """Decoder-only model whose weights are read from an export's files.

    Attributes:
        tensor: function from a tensor's role to the tensor in fp32, or None if the model has none. Roles are `words`,
            `positions`, `final_norm`, `output`, and in layer i `i.attention_norm`, `i.query`, `i.key`, `i.value`, `i.query_norm`,
            `i.key_norm`, `i.projection`, `i.mlp_norm`, `i.gate`, `i.up`, `i.down`, each followed by `.weight` or `.bias`. An MLP
            without a gate has its first projection as `i.gate`.
        layers: number of layers.
        head_size: channels of a head.
        epsilon: added to a norm's variance.
        rms_norm: True for RMSNorm, False for LayerNorm.
        activation: activation function of the MLP.
        frequency_I: rotary frequencies; None for learned positions.
        neighbours: True if rotation pairs channels 2i and 2i + 1, False for i and i + H / 2.
        turn_scale: factor of rotated queries and keys (YaRN).
    """

    tensor: Callable[[str], torch.Tensor | None]
    layers: int
    head_size: int
    epsilon: float
    rms_norm: bool
    activation: Callable[[torch.Tensor], torch.Tensor]
    frequency_I: torch.Tensor | None
    neighbours: bool = False
    turn_scale: float = 1.0

    def linear(self, x: torch.Tensor, role: str) -> torch.Tensor:
        """Linear layer with the weight of a role, and its bias if there is one."""
        return F.linear(x, self.tensor(f"{role}.weight"), self.tensor(f"{role}.bias"))

    def norm(self, x: torch.Tensor, role: str) -> torch.Tensor:
        """RMSNorm or LayerNorm over the last dimension."""
        weight_C = self.tensor(f"{role}.weight")
        if self.rms_norm:
            return F.rms_norm(x, weight_C.shape, weight_C, self.epsilon)
        return F.layer_norm(x, weight_C.shape, weight_C, self.tensor(f"{role}.bias"), self.epsilon)

    @torch.no_grad()
    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V] of tokens [B, S]. Only one linear layer is in memory at a time."""
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
        """Self-attention of a layer, without the residual connection: [B, S, C] -> [B, S, C]."""
        query, key, value = (
            self.linear(x_BSC, f"{layer}.{part}").unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        query, key = (
            self._rotated(self._normed(query, f"{layer}.query_norm")),
            self._rotated(self._normed(key, f"{layer}.key_norm")),
        )
        context_BNSH = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.linear(context_BNSH.transpose(1, 2).flatten(2), f"{layer}.projection")

    def _rotated(self, x_BNSH: torch.Tensor) -> torch.Tensor:
        """Queries or keys after the rotary embedding of their positions 0 to S - 1; unchanged with learned positions."""
        if self.frequency_I is None:
            return x_BNSH
        x_BNSH, rest = x_BNSH.tensor_split([2 * len(self.frequency_I)], -1)  # some models rotate the first channels only
        angle_SI = torch.outer(torch.arange(x_BNSH.shape[-2], dtype=torch.float64), self.frequency_I)
        cos_SI, sin_SI = (self.turn_scale * each.float() for each in (angle_SI.cos(), angle_SI.sin()))
        a, b = x_BNSH.unflatten(-1, (-1, 2)).unbind(-1) if self.neighbours else x_BNSH.chunk(2, -1)
        turned = a * cos_SI - b * sin_SI, b * cos_SI + a * sin_SI
        turned = torch.stack(turned, -1).flatten(-2) if self.neighbours else torch.cat(turned, -1)
        return torch.cat([turned, rest], -1)

    def _normed(self, x_BNSH: torch.Tensor, role: str) -> torch.Tensor:
        """Queries or keys, normalised head by head in a model that does so."""
        weight_H = self.tensor(f"{role}.weight")
        return x_BNSH if weight_H is None else F.rms_norm(x_BNSH, weight_H.shape, weight_H, self.epsilon)


def frequencies(base: float, head_size: int) -> torch.Tensor:
    """Rotary frequencies [I] in fp64: base^(-2i / head_size), radians by which channel pair i turns from a position to the next.

    head_size: number of a head's channels that are rotated.
    """
    return float(base) ** -(torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)


def yarn_factors(scaling: Mapping[str, Any], frequency_I: torch.Tensor, base: float) -> torch.Tensor:
    """Divisors [I] of rotary frequencies in YaRN (`ggml_rope_yarn` of llama.cpp).

    Args:
        scaling: factor, original_max_position_embeddings, beta_fast and beta_slow.
        frequency_I: frequencies without scaling.
        base: base of the frequencies.
    """
    size = 2 * len(frequency_I)
    first, last = (
        size * math.log(scaling["original_max_position_embeddings"] / (scaling[beta] * 2 * math.pi)) / (2 * math.log(base))
        for beta in ("beta_fast", "beta_slow")
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), size - 1)
    slowed_I = ((torch.arange(size // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return 1 / (slowed_I / scaling["factor"] + 1 - slowed_I)


def llama3_factors(scaling: Mapping[str, Any], frequency_I: torch.Tensor) -> torch.Tensor:
    """Divisors [I] of rotary frequencies in the scaling of Llama 3.1 (`apply_scaling` of Meta's code).

    Frequencies with fewer than low_freq_factor turns in a context of original_max_position_embeddings are divided by `factor`,
    frequencies with more than high_freq_factor turns are kept, and frequencies in between are interpolated.

    Args:
        scaling: factor, low_freq_factor, high_freq_factor and original_max_position_embeddings.
        frequency_I: frequencies without scaling.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns_I = scaling["original_max_position_embeddings"] * frequency_I / (2 * math.pi)  # turns within the original context
    kept_I = ((turns_I - low) / (high - low)).clamp(0, 1) if high > low else (turns_I >= high).double()
    return 1 / (kept_I + (1 - kept_I) / scaling["factor"])
