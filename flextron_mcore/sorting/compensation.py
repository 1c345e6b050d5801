"""Construction of the compensation of query heads (layers/compensation.py), by elimination of one head after the other.

Of the heads that a KV group still has, the head r is dropped whose output the others predict best, in the metric of its output
projection W_r:

    min_c E |W_r (h_r - sum_j c_j h_j)|^2      A c = v    A_jk = tr(W_r^T W_r E[h_k h_j^T])    v_j = tr(W_r^T W_r E[h_r h_j^T])

The other heads stand in for it: W_j becomes W_j + c_j W_r. The k heads that are left at some point are the k most important ones,
and their weights W_j are the output projection of a network with k heads.

Shape suffixes: S sequence, B batch, N tokens, C hidden channels, G KV groups of this rank, Q query heads of a group, H channels
of a head, K channels of all heads of a group (Q*H).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flextron_mcore.layers.compensation import folded
from flextron_mcore.runtime.unwrap import unwrap

# Combinations of heads whose energy is a smaller share of the largest one than this count as zero.
_SMALLEST = 1e-10


@dataclass(frozen=True)
class HeadCompensation:
    """Compensation of a layer's query heads, float64.

    Attributes:
        order_GQ: index of each KV group's heads, the most important first.
        matrix_GQQ: T of each group, unit lower-triangular, for heads in this order.
        errors_GQ: sum over tokens of the squared errors of the group's output that follow when this head and all less important
            ones are dropped, for heads in the order of the checkpoint. Errors of several heads are added as if they were
            orthogonal.
    """

    order_GQ: Tensor
    matrix_GQQ: Tensor
    errors_GQ: Tensor


def second_moments(heads_SBGQH: Tensor, mask_SB1: Tensor) -> Tensor:
    """Sum over tokens of the products of all channels of a KV group's heads, sum h h^T, in float64: [G, K, K].

    Args:
        heads_SBGQH: outputs of the heads.
        mask_SB1: 1 for tokens that count, else 0.
    """
    # In float64, because heads with similar attention give ill-conditioned systems, which amplify rounding a thousandfold.
    heads_GNK = (heads_SBGQH.double() * mask_SB1[..., None, None]).flatten(3).flatten(0, 1).transpose(0, 1)
    return heads_GNK.mT @ heads_GNK


def head_compensation(weight_CGQH: Tensor, moments_GKK: Tensor) -> HeadCompensation:
    """Compensation and order of the heads of each KV group, on the CPU.

    Args:
        weight_CGQH: weight of the output projection, for the outputs of the heads.
        moments_GKK: second moments of these outputs, `second_moments`.
    """
    weight_GQCH = weight_CGQH.detach().cpu().double().permute(1, 2, 0, 3)
    moments_GQHQH = moments_GKK.cpu().unflatten(1, weight_GQCH.shape[1::2]).unflatten(3, weight_GQCH.shape[1::2])
    found = [_eliminated(weight, moments) for weight, moments in zip(weight_GQCH, moments_GQHQH, strict=True)]
    return HeadCompensation(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _eliminated(weight_QCH: Tensor, moments_QHQH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(order [Q], matrix [Q, Q], errors [Q]) of one KV group, as in HeadCompensation."""
    weight_QCH, heads = weight_QCH.clone(), len(weight_QCH)
    left, removed = list(range(heads)), []  # removed: (head, heads that remain, their scalars)
    errors_Q, error = weight_QCH.new_zeros(heads), weight_QCH.new_zeros(())
    while left:
        found = [_prediction(weight_QCH[head], moments_QHQH, head, [j for j in left if j != head]) for head in left]
        least = min(range(len(left)), key=lambda i: found[i][1].item())
        head, (scalars, residual) = left.pop(least), found[least]
        error = error + residual.clamp(min=0)
        errors_Q[head] = error
        weight_QCH[left] += scalars[:, None, None] * weight_QCH[head]
        removed.append((head, list(left), scalars))
    order = [head for head, _, _ in reversed(removed)]
    matrix_QQ = torch.eye(heads, dtype=torch.float64)
    for head, others, scalars in removed:
        matrix_QQ[order.index(head), [order.index(other) for other in others]] = -scalars
    return torch.tensor(order), matrix_QQ, errors_Q


def _prediction(weight_CH: Tensor, moments_QHQH: Tensor, head: int, others: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(scalars that predict a head's output from the outputs of others, squared error of the prediction).

    Args:
        weight_CH: output projection of the head.
        moments_QHQH: second moments of the outputs of all heads.
        head: index of the head.
        others: indices of the others.
    """
    index = torch.tensor([*others, head])
    among = moments_QHQH.index_select(0, index).index_select(2, index)
    products = torch.einsum("ab,jakb->jk", weight_CH.T @ weight_CH, among)
    system, wanted = products[:-1, :-1], products[:-1, -1]
    if not others:
        return wanted, products[-1, -1]
    scalars = torch.linalg.lstsq(system, wanted[:, None], rcond=_SMALLEST, driver="gelsd").solution.squeeze(1)
    return scalars, products[-1, -1] - scalars @ wanted


def unfolded(weight_CGQH: Tensor, matrix_GQQ: Tensor) -> Tensor:
    """Solve W = W' T for W', the weight of the output projection behind the compensation T, in float64: [C, G, Q, H].

    Args:
        weight_CGQH: W, heads in the order of `matrix_GQQ`.
        matrix_GQQ: T of each KV group, as it will be stored.
    """
    found = torch.linalg.solve_triangular(
        matrix_GQQ.double().mT, weight_CGQH.double().permute(1, 2, 0, 3).flatten(2), upper=True, unitriangular=True
    )
    return found.unflatten(2, weight_CGQH.shape[::3]).permute(2, 0, 1, 3)


def fold_model(model: Sequence[torch.nn.Module]) -> None:
    """Multiply the compensation into the output projections of a model, in place, and remove it. Weights keep their precision.

    Args:
        model: this rank's virtual-pipeline chunks.
    """
    for chunk in model:
        for layer in unwrap(chunk).decoder.layers:
            projection = layer.self_attention.linear_proj
            weight_CGQH = projection.weight.detach().unflatten(1, (*projection.compensation.shape[:2], -1))
            projection.weight.detach().copy_(folded(weight_CGQH.double(), projection.compensation.double()).flatten(1))
            projection.compensation = None
