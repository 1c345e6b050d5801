"""Policy-aware modulation (LLaMaFlex): what a block adds is scaled by a learned gain, which depends on the size of the network.

A block computed with a part of its units, among others that are, adds something smaller or larger than the full one does; two
numbers a block let it make up for that at each size. Only the share of the parameters counts, so a network is the same function
whatever budget or router chose it, and its gains fold into its weights (export/cut.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flextron_mcore.space import ElasticSpace


def new_modulation(config: Any, space: ElasticSpace) -> torch.nn.Parameter | None:
    """A block's parameter [2], with which every gain is 1; None where `space` has no modulation."""
    if not space.modulation:
        return None
    modulation = torch.nn.Parameter(torch.zeros(2, dtype=config.params_dtype))
    modulation.sequence_parallel = config.sequence_parallel  # as in layers/norm.py: each rank sees a part of the sequence
    return modulation


def gain(modulation: Tensor, share: float) -> Tensor:
    """The gain [] of a block in a network with `share` (0..1) of the full model's parameters; always 1 for the full model."""
    first, second = modulation.float()
    return 1 + (1 - share) * (first + second * share)
