"""Rotary frequencies of YaRN (Peng et al., 2023) and LongRoPE (Ding et al., 2024), by the formulas of transformers."""

from __future__ import annotations

import math

import torch

from flextron_mcore.config import ModelConfig


def yarn_frequencies(model: ModelConfig) -> list[float] | None:
    """Rotary frequencies [rotary_channels / 2], in radians a position; None for a model without YaRN.

    Channel pairs that turn more than beta_fast times within the original context keep their frequency. Pairs that turn less than
    beta_slow times get their frequency divided by `factor`. Frequencies between the two are interpolated
    linearly. Equal to transformers' to the bit.
    """
    scaling, base, size = model.rope_scaling or {}, model.rotary_base, model.rotary_channels
    if scaling.get("type") != "yarn":
        return None

    def channel(turns: float) -> float:
        """Index, as a real number, of the channel pair that makes `turns` full turns within the original context."""
        return size * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(scaling["beta_fast"]), channel(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 * (low == high)
    # In fp32, operation by operation as in transformers: a difference in the last bit grows with the position.
    period_I = base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    kept_I = 1 - ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (1 / (scaling["factor"] * period_I) * (1 - kept_I) + 1 / period_I * kept_I).tolist()


def longrope_frequencies(model: ModelConfig) -> tuple[list[float], list[float]] | None:
    """Rotary frequencies [rotary_channels / 2] of sequences up to the original context, and of longer ones.

    They are in radians a position, equal to transformers' to the bit; None for a model without LongRoPE.
    """
    scaling, size = model.rope_scaling or {}, model.rotary_channels
    if scaling.get("type") != "longrope":
        return None
    period_I = model.rotary_base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    short, long = ((1 / (torch.tensor(scaling[name]) * period_I)).tolist() for name in ("short_factor", "long_factor"))
    return short, long
