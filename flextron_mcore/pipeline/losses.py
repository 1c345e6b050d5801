"""Losses of one micro-batch.

Shape suffixes: B batch, S sequence, V vocabulary (this rank's part where it is split).
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor


def masked_sum(loss_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Sum of the per-token losses where the mask is 1."""
    return (loss_BS.float() * mask_BS).sum()


def distillation(student_BSV: Tensor, teacher_BSV: Tensor, temperature: float) -> Tensor:
    """Per-token KL(teacher || student) times the squared temperature (Hinton et al., arXiv:1503.02531): [B, S].

    Logits split over tensor-parallel ranks are gathered. No gradient reaches the teacher.
    """
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        student_BSV = gather_from_tensor_model_parallel_region(student_BSV)
        teacher_BSV = gather_from_tensor_model_parallel_region(teacher_BSV)
    student = F.log_softmax(student_BSV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BSV.detach().float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2
