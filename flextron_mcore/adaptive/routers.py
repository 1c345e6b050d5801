"""Input-adaptive routers: a small MLP in every block, from target and hidden state to the block's candidates (Flextron, eq. 11).

    R_i(T, h) = W_R tanh(W T + W_H h) + b_i(T)

h is the layer-normalised input of the block. b_i(T), beyond the paper, holds the static routers' damped log-probabilities for T:
training starts from their choices. A choice depends on the token's own h and on T only, so prefill and decoding choose alike.

Shape suffixes: S sequence, B batch, N blocks, K candidates, C constrained costs, D hidden channels, U hidden units of a router.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flextron_mcore.choices import Choices
from flextron_mcore.routers.static import StaticRouters

# Factor of the static routers' log-probabilities, and bound of the product: tokens must be able to choose other candidates.
_KEPT, _MOST = 0.25, 2.0


class AdaptiveRouters(torch.nn.Module):
    """Routers that choose a candidate of each block for every token, from the token's hidden state and a target of the cost.

    A block is the attention or the MLP of a layer, a candidate one of the widths that the elastic space gives it. Every block has
    a router of its own, a small MLP with tanh (Flextron, section 3.2, eq. 11). A target says how much of each cost to spend: 0 is
    the smallest network's cost, 1 the full model's.

    Args:
        choices: blocks of the model, and candidates of each.
        costs: number C of costs with a target (latency, parameters, memory).
        hidden_size: hidden units U of a router.
        static: trained static routers, which choose one candidate of each block for all tokens. They stay frozen; their
            probabilities are a bias of the logits, so that training starts from their choices.
    """

    def __init__(self, choices: Choices, costs: int, hidden_size: int, static: StaticRouters) -> None:
        super().__init__()
        count, width = choices.exists_NK.shape
        channels = choices.model.hidden_size
        self.static = static.requires_grad_(False)
        self.target_NUC = torch.nn.Parameter(torch.randn(count, hidden_size, costs))
        self.token_NUD = torch.nn.Parameter(torch.randn(count, hidden_size, channels) * channels**-0.5)
        self.out_NKU = torch.nn.Parameter(torch.zeros(count, width, hidden_size))
        self.bias_NK = torch.nn.Parameter(torch.zeros(count, width))

    def forward(self, block: int, hidden_SBD: Tensor, target_C: Tensor, start_NK: Tensor) -> Tensor:
        """Logits [S, B, K] of the candidates of one block for each token; minus infinity for candidates that the block lacks.

        Args:
            block: index of the block.
            hidden_SBD: input of the block.
            target_C: target of each cost, 0 (smallest network) to 1 (full model).
            start_NK: bias b(T) of the logits, the result of `start` for the same target.
        """
        bias_U, bias_K = self.target_NUC[block] @ target_C, self.bias_NK[block] + start_NK[block]
        return router_logits(hidden_SBD, self.token_NUD[block], bias_U, self.out_NKU[block], bias_K)

    @torch.no_grad()
    def start(self, target_C: Tensor) -> Tensor:
        """Bias b(T) of the logits [N, K]: damped log-probabilities of the static routers; minus infinity for missing candidates.

        target_C: target T of each cost, 0 (smallest network) to 1 (full model).
        """
        log_p_NK = self.static(target_C[None])[0].log_softmax(-1)
        start_NK = (log_p_NK * _KEPT).clamp_min(-_MOST)
        return start_NK.masked_fill(~self.static.exists_NK, -torch.inf)


def router_logits(hidden_SBD: Tensor, token_UD: Tensor, bias_U: Tensor, out_KU: Tensor, bias_K: Tensor) -> Tensor:
    """Logits [S, B, K] of one router, W_R tanh(W_H h + bias_U) + bias_K, with h the layer-normalised input (Flextron, eq. 11).

    The product with W_H is computed in the dtype of `hidden_SBD`, the rest in float32.

    Args:
        hidden_SBD: input of the block, before layer normalisation.
        token_UD: weight W_H of the hidden state.
        bias_U: W T, the product of the target's weight W and the target T.
        out_KU: weight W_R of the output.
        bias_K: bias of the logits.
    """
    hidden_SBD = F.layer_norm(hidden_SBD, hidden_SBD.shape[-1:])
    units_SBU = F.linear(hidden_SBD, token_UD.to(hidden_SBD.dtype), bias_U.to(hidden_SBD.dtype))
    return F.linear(units_SBU.float().tanh_(), out_KU, bias_K)


def count_levels(levels_SB: Tensor, width: int, counted_SB: Tensor) -> Tensor:
    """Number [K] of counted tokens at each level (index of the candidate), without waiting for the device.

    Args:
        levels_SB: level of each token.
        width: number K of levels.
        counted_SB: True where a token counts.
    """
    hot_SBK = levels_SB.unsqueeze(-1) == torch.arange(width, device=levels_SB.device)
    return (hot_SBK & counted_SB.unsqueeze(-1)).sum((0, 1))
