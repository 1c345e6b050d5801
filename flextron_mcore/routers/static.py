"""Static routers: a small MLP for every choice, from the targets of the costs to the choice's candidates (Flextron, eq. 9).

Shape suffixes: T targets, C constrained costs, N choices, K candidates, U hidden units of a router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flextron_mcore.choices import Choices

# Initial logit of the largest candidate; smaller ones have less, linearly, so the full model is a little more likely at first.
_START = 1.0


class StaticRouters(torch.nn.Module):
    """Routers that choose a candidate of each choice for all tokens, from targets of the costs (Flextron, eq. 9).

    logits_n(T) = W_out tanh(W_in T + shift) / sqrt(U) + bias, with weights for each choice n. A target is 0 at the smallest
    network's cost and 1 at the full model's. Hidden units are initialised as steep steps at random targets over this range, so
    training can separate similar budgets from its first step. W_out is initialised with zeros, and the bias favours larger
    candidates: at first the logits are the same at all targets.

    Args:
        choices: choices that the routers make.
        costs: number C of costs with a target.
        hidden_size: hidden units U of a router.
    """

    def __init__(self, choices: Choices, costs: int, hidden_size: int) -> None:
        super().__init__()
        exists_NK = torch.from_numpy(choices.exists_NK)
        count, width = exists_NK.shape
        self.register_buffer("exists_NK", exists_NK, persistent=False)
        self.embed_NUC = torch.nn.Parameter(torch.randn(count, hidden_size, costs) * 8)
        at_NUC = torch.rand(count, hidden_size, costs)
        self.shift_NU = torch.nn.Parameter(-(self.embed_NUC.detach() * at_NUC).sum(-1))
        self.out_NKU = torch.nn.Parameter(torch.zeros(count, width, hidden_size))
        sizes = exists_NK.sum(-1, keepdim=True)
        self.bias_NK = torch.nn.Parameter(_START * torch.arange(1, width + 1).expand(count, -1) / sizes)

    def forward(self, targets_TC: Tensor) -> Tensor:
        """Logits [T, N, K] of the candidates of each choice at T targets; minus infinity for candidates that a choice lacks.

        targets_TC: target of each cost, 0 (smallest network) to 1 (full model).
        """
        hidden_TNU = torch.tanh(torch.einsum("tc,nuc->tnu", targets_TC, self.embed_NUC) + self.shift_NU)
        logits_TNK = torch.einsum("tnu,nku->tnk", hidden_TNU, self.out_NKU) / hidden_TNU.shape[-1] ** 0.5 + self.bias_NK
        return logits_TNK.masked_fill(~self.exists_NK, -torch.inf)


def gates(logits_TNK: Tensor, indices_TN: Tensor) -> Tensor:
    """Straight-through gates p / stopgrad(p) [T, N] of the chosen candidates: value 1, and a gradient to the routers.

    Args:
        logits_TNK: logits of the routers, of whose softmax p is the entry of the chosen candidate.
        indices_TN: index of the chosen candidate.
    """
    log_p_TN = logits_TNK.log_softmax(-1).gather(-1, indices_TN.unsqueeze(-1)).squeeze(-1)
    return (log_p_TN - log_p_TN.detach()).exp()


def log_probabilities(routers: StaticRouters) -> Callable[[Sequence[float]], np.ndarray]:
    """Function from targets [C] to the routers' log-probabilities of the candidates [N, K], minus infinity for missing ones."""

    @torch.no_grad()
    def log_p(targets: Sequence[float]) -> np.ndarray:
        return routers(torch.tensor([list(targets)], dtype=torch.float32)).log_softmax(-1)[0].double().numpy()

    return log_p
