"""Input-adaptive routers: every block has a small MLP from target and hidden state to its candidates (Flextron, 3.2).

    R_i(T, h) = W_R tanh(W T + W_H h) + b_i(T)

h is the input of the block, normalised; b_i(T) holds the static routers' log-probabilities for T, damped, so that training begins
where theirs ended. A choice depends on the token's own h and on T only, so that decoding chooses as prefill does.

Shape suffixes: S sequence, B batch, N blocks, K candidates, C constrained costs, D hidden channels, U hidden units of a router.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flextron_mcore.choices import Choices
from flextron_mcore.routers.static import StaticRouters

# Part of the static routers' log-probabilities that is kept, and its bound: tokens must be able to choose otherwise.
_KEPT, _MOST = 0.25, 2.0


class AdaptiveRouters(torch.nn.Module):
    """Routers of all blocks. Targets as in StaticRouters: 0 is the smallest network's cost and 1 the full model's."""

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
        """Logits [S, B, K] of one block; minus infinity where it has no candidate. start_NK: `start` of the target."""
        bias_U, bias_K = self.target_NUC[block] @ target_C, self.bias_NK[block] + start_NK[block]
        return router_logits(hidden_SBD, self.token_NUD[block], bias_U, self.out_NKU[block], bias_K)

    @torch.no_grad()
    def start(self, target_C: Tensor) -> Tensor:
        """b(T): [N, K]."""
        log_p_NK = self.static(target_C[None])[0].log_softmax(-1)
        start_NK = (log_p_NK * _KEPT).clamp_min(-_MOST)
        return start_NK.masked_fill(~self.static.exists_NK, -torch.inf)


def router_logits(hidden_SBD: Tensor, token_UD: Tensor, bias_U: Tensor, out_KU: Tensor, bias_K: Tensor) -> Tensor:
    """Logits [S, B, K] of one router. Sums over channels have the hidden state's precision."""
    hidden_SBD = F.layer_norm(hidden_SBD, hidden_SBD.shape[-1:])
    units_SBU = F.linear(hidden_SBD, token_UD.to(hidden_SBD.dtype), bias_U.to(hidden_SBD.dtype))
    return F.linear(units_SBU.float().tanh_(), out_KU, bias_K)


def count_levels(levels_SB: Tensor, width: int, counted_SB: Tensor) -> Tensor:
    """Number of counted tokens at each of `width` levels: [K]. Does not wait for the device."""
    hot_SBK = levels_SB.unsqueeze(-1) == torch.arange(width, device=levels_SB.device)
    return (hot_SBK & counted_SB.unsqueeze(-1)).sum((0, 1))
