"""Compensation: each kept query head also stands in for its share of the less important heads of its KV group.

The query heads of a KV group share its values, so scalars predict a head's output from the outputs of others. With the outputs
h [Q, H] of a group's heads, a unit lower-triangular matrix T [Q, Q] of such scalars and the output projection W = W' T,

    W h = W' (T h)

Row k of T is (-c_k, 1, 0, ...), so (T h)_k is the part of head k that the heads before it do not predict. The full model is
unchanged, and the first k heads, W'[:k] (T h)[:k], have the output projection W'[:k] T[:k, :k]: the prediction of heads that are
dropped is in its weights. T depends on no number of heads. sorting/compensation.py computes it.

Shape suffixes: C hidden channels, G KV groups of this rank, Q query heads of a group, q and r heads in use, H channels of a head,
X leading dimensions of any number.
"""

from __future__ import annotations

import torch
from torch import Tensor

TENSOR = "self_attention.linear_proj.compensation"


def compensated(heads_XGrH: Tensor, compensation_Gqr: Tensor) -> Tensor:
    """Part of each head's output that the heads before it do not predict, T h: [X, G, r, H] -> [X, G, q, H].

    Args:
        heads_XGrH: outputs of the heads.
        compensation_Gqr: rows and columns of T, for the heads of the result and of the input.
    """
    return torch.einsum("gqr,...grh->...gqh", compensation_Gqr, heads_XGrH)


def folded(weight_CGqH: Tensor, compensation_Gqq: Tensor) -> Tensor:
    """Weight of the output projection with the compensation multiplied into it, W'[:k] T[:k, :k]: [C, G, q, H].

    Args:
        weight_CGqH: columns of the heads in use.
        compensation_Gqq: rows and columns of T of the heads in use.
    """
    return torch.einsum("cgqh,gqr->cgrh", weight_CGqH, compensation_Gqq)
