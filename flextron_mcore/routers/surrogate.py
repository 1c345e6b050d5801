"""Surrogate model of the language-model loss, from the routers' choices (Flextron, eq. 10).

Shape suffixes: B samples (choices of a network, or of a token), N blocks, K candidates, P hidden units, D hidden channels of the
language model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Surrogate(torch.nn.Module):
    """Two-layer MLP S(r) = W_2 gelu(W_1 r [+ W_h h]) from the candidates r that all blocks use to the degradation.

    The degradation is the loss minus the full model's loss on the same batch, in nats per token: losses differ far more between
    batches than between networks. r is a one-hot vector for each block, not the paper's logits, because logits with the same
    argmax have the same loss.

    Args:
        blocks: number N of blocks.
        candidates: largest number K of candidates of a block.
        hidden_size: hidden units P.
        channels: size D of the final hidden state h, a second input for adaptive routers, whose samples are tokens; 0 for static
            routers, without h.
    """

    def __init__(self, blocks: int, candidates: int, hidden_size: int, channels: int = 0) -> None:
        super().__init__()
        self.first = torch.nn.Linear(blocks * candidates, hidden_size)
        self.project = torch.nn.Linear(channels, hidden_size, bias=False) if channels else None
        self.second = torch.nn.Linear(hidden_size, 1)
        self.register_buffer("scale", torch.ones(()))  # typical degradation, which multiplies the output

    def forward(self, choices_BNK: Tensor, final_BD: Tensor | None = None) -> Tensor:
        """Predicted degradation [B], in nats per token.

        choices_BNK: one-hot candidate of each block. final_BD: final hidden states; None if the surrogate has no `channels`.
        """
        return self._second(self._first(choices_BNK, final_BD))

    def replaced(self, choices_BNK: Tensor, final_BD: Tensor | None = None) -> Tensor:
        """Predicted degradation [B, N, K] with candidate k in block n and all other blocks as in `choices_BNK`.

        choices_BNK: one-hot candidate of each block. final_BD: final hidden states; None if the surrogate has no `channels`.
        """
        columns_NKP = self.first.weight.T.unflatten(0, choices_BNK.shape[1:])
        now_BNP = torch.einsum("bnk,nkp->bnp", choices_BNK, columns_NKP)
        hidden_BP = self._first(choices_BNK, final_BD)
        return self._second(hidden_BP[:, None, None] - now_BNP[:, :, None] + columns_NKP)

    def _first(self, choices_BNK: Tensor, final_BD: Tensor | None) -> Tensor:
        """Hidden units [B, P] before the activation; W_1 r, plus W_h times the layer-normalised `final_BD` if there is one."""
        hidden_BP = self.first(choices_BNK.flatten(1))
        if final_BD is None:
            return hidden_BP
        return hidden_BP + self.project(F.layer_norm(final_BD.float(), final_BD.shape[-1:]))

    def _second(self, hidden_P: Tensor) -> Tensor:
        """Degradation [...] from hidden units before the activation [..., P]."""
        return self.second(torch.nn.functional.gelu(hidden_P)).squeeze(-1) * self.scale
