"""Losses of one micro-batch.

Shape suffixes: B batch, S sequence, V vocabulary of this tensor-parallel rank.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor


def masked_sum(loss_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Sum [] of per-token losses, each multiplied by its entry of the loss mask, in float32."""
    return (loss_BS.float() * mask_BS).sum()


def distillation(student_BSV: Tensor, teacher_BSV: Tensor, temperature: float) -> Tensor:
    """Distillation loss of each token [B, S]: temperature^2 * KL(teacher || student) (Hinton et al., arXiv:1503.02531).

    Logits stay split over tensor-parallel ranks; only sums over the vocabulary are exchanged. No gradient reaches the teacher.

    Args:
        student_BSV, teacher_BSV: logits of this rank's part of the vocabulary.
        temperature: number that divides the logits of both.
    """
    teacher_BSV, teacher_sum_BS = _shifted(teacher_BSV.detach(), temperature)
    student_BSV, student_sum_BS = _shifted(student_BSV, temperature)
    log_p_BSV = teacher_BSV - teacher_sum_BS.log().unsqueeze(-1)
    # The student's log-sum-exp is equal on all ranks, so it is added after the sum over ranks, which would count it repeatedly.
    cross_BS = reduce_from_tensor_model_parallel_region((log_p_BSV.exp() * (log_p_BSV - student_BSV)).sum(-1))
    return (cross_BS + student_sum_BS.log()) * temperature**2


def _shifted(logits_BSV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(logits / temperature - m [B, S, V], sum of their exponentials [B, S]).

    The maximum m of each token and the sum are over the whole vocabulary, not this rank's part only.
    """
    logits_BSV = logits_BSV.float() / temperature
    largest_BS = logits_BSV.detach().amax(-1)
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_reduce(largest_BS, torch.distributed.ReduceOp.MAX, group=group)
    logits_BSV = logits_BSV - largest_BS.unsqueeze(-1)
    return logits_BSV, reduce_from_tensor_model_parallel_region(logits_BSV.exp().sum(-1))
