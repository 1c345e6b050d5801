"""Zero gradients for parameters that a sub-network does not use, which Megatron-Core's DDP waits for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def report_unused(hidden_states: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Return `hidden_states` unchanged; the backward pass also reports a zero gradient for each of `parameters` to DDP.

    With overlap_grad_reduce, Megatron-Core's DDP starts to reduce a bucket of gradients when all its parameters had a gradient in
    the last micro-batch; a parameter without one would stall it. For a matrix the returned gradient is an uninitialised tensor,
    whose memory is never touched: DDP ignores its values, because slices of matrices add their gradients themselves
    (layers/linear.py).
    """
    if not torch.is_grad_enabled():
        return hidden_states
    return _Unused.apply(hidden_states, *(parameter for parameter in parameters if parameter.requires_grad))


class _Unused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, *parameters: Tensor):  # type: ignore[override]
        ctx.parameters = parameters
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, *(_no_gradient(parameter) for parameter in ctx.parameters)


def _no_gradient(parameter: Tensor) -> Tensor | None:
    """Gradient to return for an unused parameter: zeros, for a matrix an uninitialised tensor, None without DDP.

    A matrix is marked with `grad_added_to_main_grad`, so that DDP does not add the tensor.
    """
    if getattr(parameter, "main_grad", None) is None:
        return None
    if parameter.dim() < 2:
        return torch.zeros_like(parameter)
    parameter.grad_added_to_main_grad = True
    return torch.empty_like(parameter)
