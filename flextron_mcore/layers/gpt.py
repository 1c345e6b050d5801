"""The GPTModel that knows its own architecture, and the mask of the vocabulary's padding."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from flextron_mcore.config import ModelConfig


class ArchitectureGPTModel(GPTModel):
    """A GPTModel whose loss does not see the padding of the vocabulary, which depends on the layout."""

    architecture: ModelConfig

    @property
    def real_vocab_size(self) -> int:
        """Rows of the vocabulary without padding."""
        return self.architecture.vocab_size

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Loss of each token [B, S]; labels [B, S], logits [S, B, V of this rank]."""
        return super().compute_language_model_loss(labels, mask_padding(logits, self.real_vocab_size))


def mask_padding(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits [..., V of this rank] with a probability of zero for the rows that pad the vocabulary to equal parts."""
    part = logits.shape[-1]
    real = vocab_size - parallel_state.get_tensor_model_parallel_rank() * part
    if real >= part:
        return logits
    return logits.masked_fill(torch.arange(part, device=logits.device) >= real, -1e9)
