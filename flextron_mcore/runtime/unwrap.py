"""Access to the model inside Megatron-Core's wrappers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def unwrap(model: nn.Module) -> GPTModel:
    """GPTModel inside Megatron-Core's wrappers (DistributedDataParallel, Float16Module); a model without wrapper is returned."""
    while hasattr(model, "module"):
        model = model.module
    return model
