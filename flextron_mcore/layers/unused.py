"""Parameters that a network leaves out, and Megatron-Core's DDP."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def unused(hidden_states: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Hidden states, unchanged; their backward pass tells Megatron-Core's DDP that these parameters had their turn.

    With overlapping reduction it counts, in the last micro-batch of a step, which parameters had a gradient, and starts when all
    had one. Of matrices only parts are ever used (layers/linear.py): nothing is added, and the pages of the stand-in for
    their gradient are never touched.
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
        return grad, *(_nothing(parameter) for parameter in ctx.parameters)


def _nothing(parameter: Tensor) -> Tensor | None:
    if getattr(parameter, "main_grad", None) is None:
        return None
    if parameter.dim() < 2:
        return torch.zeros_like(parameter)
    parameter.grad_added_to_main_grad = True
    return torch.empty_like(parameter)
