"""Losses of one micro-batch.

Shape suffixes: B batch, S sequence.
"""

from __future__ import annotations

from torch import Tensor


def masked_sum(loss_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Sum [] of per-token losses, each multiplied by its entry of the loss mask, in float32."""
    return (loss_BS.float() * mask_BS).sum()
