"""Gates: scalars of value 1 on blocks' outputs, whose gradients tell routers what the blocks are worth."""

from __future__ import annotations

import torch
from torch import Tensor


def gated(output: tuple[Tensor, Tensor | None], gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A block's output [S, B, C] and its bias [C], each times `gate` (None: as they are)."""
    if gate is None:
        return output
    value, bias = output
    return value * gate.to(value.dtype), None if bias is None else bias * gate.to(bias.dtype)


def new_gates(networks: int, blocks: int, device: torch.device) -> list[list[Tensor]]:
    """A gate for each block of each network: leaves, so that their gradients gather over micro-batches."""
    return [[torch.ones((), device=device, requires_grad=True) for _ in range(blocks)] for _ in range(networks)]
