"""Static routers: every choice has a small MLP from the budget to its candidates (Flextron, eq. 9).

Shape suffixes: T targets, C costs that are constrained, N choices, K candidates, U hidden units of a router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flextron_mcore.choices import Choices

# Logits that the routers start from, over the candidates from smallest to largest: the full model is a little more likely.
_START = 1.0


class StaticRouters(torch.nn.Module):
    """The routers of all choices.

    A target of 0 is the smallest network's cost and 1 the full model's. Hidden units begin as steps at different targets, all
    over that range: a router can tell near-by budgets apart from the first step on.
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
        """Logits [T, N, K]; minus infinity where a choice has no candidate."""
        hidden_TNU = torch.tanh(torch.einsum("tc,nuc->tnu", targets_TC, self.embed_NUC) + self.shift_NU)
        logits_TNK = torch.einsum("tnu,nku->tnk", hidden_TNU, self.out_NKU) / hidden_TNU.shape[-1] ** 0.5 + self.bias_NK
        return logits_TNK.masked_fill(~self.exists_NK, -torch.inf)


def gates(logits_TNK: Tensor, indices_TN: Tensor) -> Tensor:
    """p / stopgrad(p) of the chosen candidates: ones [T, N] through which a block's output tells its router."""
    log_p_TN = logits_TNK.log_softmax(-1).gather(-1, indices_TN.unsqueeze(-1)).squeeze(-1)
    return (log_p_TN - log_p_TN.detach()).exp()


def log_probabilities(routers: StaticRouters) -> Callable[[Sequence[float]], np.ndarray]:
    """A function from targets [C] to log-probabilities [N, K]."""

    @torch.no_grad()
    def log_p(targets: Sequence[float]) -> np.ndarray:
        return routers(torch.tensor([list(targets)], dtype=torch.float32)).log_softmax(-1)[0].double().numpy()

    return log_p
