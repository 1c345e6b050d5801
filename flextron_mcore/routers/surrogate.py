"""The surrogate model: what the routers' choices do to the language-model loss (Flextron, eq. 10).

Shape suffixes: B pairs, N blocks, K candidates, P hidden units, D hidden channels of the language model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Surrogate(torch.nn.Module):
    """Two layers from all routers' choices to the loss above the full model's on the same batch [nats per token].

    It sees choices as one-hot vectors, not logits: two logits with the same argmax have the same loss. The difference from the
    full model's loss leaves out what differs between batches, which is far more than what differs between networks.
    channels: for input-adaptive routers, a pair is a token, and the language model's final hidden state [B, D] is an input too,
    projected; the loss is the token's.
    """

    def __init__(self, blocks: int, candidates: int, hidden_size: int, channels: int = 0) -> None:
        super().__init__()
        self.first = torch.nn.Linear(blocks * candidates, hidden_size)
        self.project = torch.nn.Linear(channels, hidden_size, bias=False) if channels else None
        self.second = torch.nn.Linear(hidden_size, 1)
        self.register_buffer("scale", torch.ones(()))  # of the losses

    def forward(self, choices_BNK: Tensor, final_BD: Tensor | None = None) -> Tensor:
        """Loss [B]."""
        return self._second(self._first(choices_BNK, final_BD))

    def replaced(self, choices_BNK: Tensor, final_BD: Tensor | None = None) -> Tensor:
        """Loss [B, N, K] with candidate k in block n and all other blocks as in `choices_BNK`."""
        columns_NKP = self.first.weight.T.unflatten(0, choices_BNK.shape[1:])
        now_BNP = torch.einsum("bnk,nkp->bnp", choices_BNK, columns_NKP)
        hidden_BP = self._first(choices_BNK, final_BD)
        return self._second(hidden_BP[:, None, None] - now_BNP[:, :, None] + columns_NKP)

    def _first(self, choices_BNK: Tensor, final_BD: Tensor | None) -> Tensor:
        hidden_BP = self.first(choices_BNK.flatten(1))
        if final_BD is None:
            return hidden_BP
        return hidden_BP + self.project(F.layer_norm(final_BD.float(), final_BD.shape[-1:]))

    def _second(self, hidden_P: Tensor) -> Tensor:
        return self.second(torch.nn.functional.gelu(hidden_P)).squeeze(-1) * self.scale
