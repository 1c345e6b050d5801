"""Divergence of a network's output from a teacher's (knowledge distillation), over a vocabulary split over tensor-parallel ranks.

Shape suffixes: B batch, S sequence, V vocabulary of this tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor


@dataclass
class Lesson:
    """Distillation in the forward passes of one micro-batch through its networks.

    Attributes:
        temperature: number that divides the logits of teacher and student.
        teacher_SBV: the teacher's logits, padding of the vocabulary included; None: the next network is the teacher.
    """

    temperature: float
    teacher_SBV: Tensor | None = None


def divergence(student_SBV: Tensor, teacher_SBV: Tensor, temperature: float) -> Tensor:
    """Forward KL divergence of each token [S, B]: temperature^2 * KL(teacher || student) (Hinton et al., arXiv:1503.02531).

    Logits stay split over tensor-parallel ranks; only maxima and sums over the vocabulary are exchanged. No gradient reaches the
    teacher. The backward pass has one fp32 tensor of the logits' shape.

    Args:
        student_SBV, teacher_SBV: logits of this rank's part of the vocabulary, in any precision.
        temperature: number that divides the logits of both.
    """
    return _Divergence.apply(student_SBV, teacher_SBV.detach(), temperature)


class _Divergence(torch.autograd.Function):
    """Autograd function of `divergence`.

    Its gradient with respect to the student's logits is temperature * (softmax of the student - softmax of the teacher).
    """

    @staticmethod
    def forward(ctx, student_SBV: Tensor, teacher_SBV: Tensor, temperature: float) -> Tensor:  # type: ignore[override]
        log_q_SBV, log_p_SBV = (_log_softmax(logits, temperature) for logits in (student_SBV, teacher_SBV))
        p_SBV = log_p_SBV.exp()
        found_SB = log_p_SBV.sub_(log_q_SBV).mul_(p_SBV).sum(-1)
        torch.distributed.all_reduce(found_SB, group=parallel_state.get_tensor_model_parallel_group())
        ctx.temperature, ctx.dtype = temperature, student_SBV.dtype
        ctx.save_for_backward(log_q_SBV.exp_().sub_(p_SBV))
        return found_SB * temperature**2

    @staticmethod
    def backward(ctx, grad_SB: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (difference_SBV,) = ctx.saved_tensors
        return (difference_SBV * (grad_SB * ctx.temperature).unsqueeze(-1)).to(ctx.dtype), None, None


def _log_softmax(logits_SBV: Tensor, temperature: float) -> Tensor:
    """Logarithm of the softmax of logits / temperature over the whole vocabulary, not this rank's part only: fp32 [S, B, V]."""
    group = parallel_state.get_tensor_model_parallel_group()
    scaled_SBV = logits_SBV.float() / temperature
    largest_SB = scaled_SBV.amax(-1)
    torch.distributed.all_reduce(largest_SB, torch.distributed.ReduceOp.MAX, group=group)
    scaled_SBV -= largest_SB.unsqueeze(-1)
    sum_SB = scaled_SBV.exp().sum(-1)
    torch.distributed.all_reduce(sum_SB, group=group)
    return scaled_SBV.sub_(sum_SB.log().unsqueeze(-1))
