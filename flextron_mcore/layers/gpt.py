"""GPTModel with its ModelConfig, and a loss that ignores the padding of the vocabulary and bounds the memory of the logits.

Shape suffixes: S sequence, B batch, C hidden channels in use, V vocabulary of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flextron_mcore.config import ModelConfig, loss_chunk
from flextron_mcore.layers.ends import ElasticOutputLayer


class ArchitectureGPTModel(GPTModel):
    """GPTModel whose loss ignores the vocabulary's padding, because the size of the padding depends on the tensor-parallel size.

    If the logits of a micro-batch are many, the loss is computed in chunks of the sequence, and the backward pass computes each
    chunk's logits again.

    Attributes:
        architecture: architecture of the full model.
    """

    architecture: ModelConfig

    @property
    def real_vocab_size(self) -> int:
        """Vocabulary size without padding."""
        return self.architecture.vocab_size

    def forward(self, *args: Any, labels: Tensor | None = None, **options: Any) -> Tensor:
        """Logits [B, S, V], padding of the vocabulary included, or with labels [B, S] the loss of each token [B, S] in nats.

        A pipeline stage that is not the last one returns hidden states [S, B, C].

        args, options: remaining arguments of Megatron-Core's GPTModel.
        """
        layer = getattr(self, "output_layer", None)
        if labels is None or not isinstance(layer, ElasticOutputLayer):
            return super().forward(*args, labels=labels, **options)
        batch, length = labels.shape
        layer.deferred = loss_chunk(length, batch, layer.output_size_per_partition) < length
        try:
            return super().forward(*args, labels=labels, **options)
        finally:
            layer.deferred = False

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of each token [B, S], in nats.

        Args:
            labels: [B, S].
            logits: [S, B, V]; or hidden states [S, B, C] after a deferred `ElasticOutputLayer.forward`, whose logits are then
                computed here in chunks of the sequence.
        """
        layer = getattr(self, "output_layer", None)
        if not getattr(layer, "deferred", False):
            return super().compute_language_model_loss(labels, mask_padding(logits, self.real_vocab_size))
        states_SBC, weight_VC = layer.prepared(logits)
        size = loss_chunk(len(states_SBC), states_SBC.shape[1], len(weight_VC))

        def loss(states_SBC: Tensor, weight_VC: Tensor, labels_BS: Tensor) -> Tensor:
            part = mask_padding(layer.project(states_SBC, weight_VC), self.real_vocab_size)
            return super(ArchitectureGPTModel, self).compute_language_model_loss(labels_BS, part)

        losses = []
        for start in range(0, len(states_SBC), size):
            part = slice(start, start + size)
            given = states_SBC[part], weight_VC, labels[:, part].contiguous()
            if torch.is_grad_enabled():
                losses.append(checkpoint(loss, *given, use_reentrant=False, preserve_rng_state=False))
            else:
                losses.append(loss(*given))
        return torch.cat(losses, dim=1)


def mask_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Set the logits of the vocabulary's padding to -1e9, so that its probability is zero: [..., V] -> [..., V].

    logits: logits of this tensor-parallel rank's part of the vocabulary. vocab_size: size without padding, over all ranks.
    """
    part = logits.shape[-1]
    real = vocab_size - parallel_state.get_tensor_model_parallel_rank() * part
    if real >= part:
        return logits
    return logits.masked_fill(torch.arange(part, device=logits.device) >= real, -1e9)
