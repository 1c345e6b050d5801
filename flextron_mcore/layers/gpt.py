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
from flextron_mcore.layers.distillation import Lesson, divergence
from flextron_mcore.layers.ends import ElasticOutputLayer


class ArchitectureGPTModel(GPTModel):
    """GPTModel whose loss ignores the vocabulary's padding, because the size of the padding depends on the tensor-parallel size.

    If the logits of a micro-batch are many, the loss is computed in chunks of the sequence, and the backward pass computes each
    chunk's logits again. With a `Lesson` the divergence from a teacher is computed beside the loss, chunk by chunk.

    Attributes:
        architecture: architecture of the full model.
    """

    architecture: ModelConfig
    _lesson: Lesson | None = None  # distillation of the forward pass in progress

    @property
    def real_vocab_size(self) -> int:
        """Vocabulary size without padding."""
        return self.architecture.vocab_size

    def forward(self, *args: Any, labels: Tensor | None = None, lesson: Lesson | None = None, **options: Any) -> Tensor:
        """Logits [B, S, V], padding of the vocabulary included, or with labels [B, S] the loss of each token [B, S] in nats.

        A pipeline stage that is not the last one returns hidden states [S, B, C].

        Args:
            labels: [B, S]; None for logits.
            lesson: distillation; None for none. Without logits of a teacher in it, this network's become them. With them, the
                result is [2, B, S]: the losses, and the divergences from the teacher.
            args, options: remaining arguments of Megatron-Core's GPTModel.
        """
        layer = getattr(self, "output_layer", None)
        if labels is None or not isinstance(layer, ElasticOutputLayer):
            return super().forward(*args, labels=labels, **options)
        batch, length = labels.shape
        layer.deferred = loss_chunk(length, batch, layer.output_size_per_partition) < length
        self._lesson = lesson
        try:
            return super().forward(*args, labels=labels, **options)
        finally:
            layer.deferred, self._lesson = False, None

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of each token [B, S], in nats; in a `forward` with a teacher's logits [2, B, S].

        The second plane is then the divergence from the teacher (`layers.distillation.divergence`). A `forward` with a `lesson`
        but without a teacher's logits stores this network's logits as those of the teacher, for the next networks.

        Args:
            labels: [B, S].
            logits: [S, B, V], this rank's part of the vocabulary, overwritten. If the output layer left the logits to the loss
                (`ElasticOutputLayer.deferred`), hidden states [S, B, C], from which they are computed here in chunks of the
                sequence.
        """
        layer, lesson = getattr(self, "output_layer", None), self._lesson
        taught = lesson.teacher_SBV if lesson else None
        if getattr(layer, "deferred", False):
            return self._in_chunks(labels, logits, lesson, taught)
        if lesson and taught is None:
            lesson.teacher_SBV = torch.empty_like(logits)
            return self._losses(labels, logits, lesson.teacher_SBV)
        return self._losses(labels, logits, None, taught, lesson)

    def _in_chunks(self, labels: Tensor, states_SBC: Tensor, lesson: Lesson | None, taught: Tensor | None) -> Tensor:
        """Losses of all positions in nats [B, S], computed from hidden states in chunks of the sequence.

        With a teacher [2, B, S], the divergences from it last.

        Args:
            labels: [B, S].
            states_SBC: hidden states, result of a deferred `ElasticOutputLayer.forward`.
            lesson: distillation; None for none. Without `taught`, it gets this network's logits, which teach the next networks.
            taught: logits of the teacher [S, B, V]; None without one.
        """
        layer = self.output_layer
        states_SBC, weight_VC = layer.prepared(states_SBC)
        size = loss_chunk(len(states_SBC), states_SBC.shape[1], len(weight_VC))

        kept = None
        if lesson and taught is None:
            kept = lesson.teacher_SBV = states_SBC.new_empty(*states_SBC.shape[:2], len(weight_VC))

        def losses(part: slice, states_SBC: Tensor, weight_VC: Tensor, labels_BS: Tensor) -> Tensor:
            own, theirs = (None if each is None else each[part] for each in (kept, taught))
            return self._losses(labels_BS, layer.project(states_SBC, weight_VC), own, theirs, lesson)

        found = []
        for start in range(0, len(states_SBC), size):
            part = slice(start, start + size)
            given = part, states_SBC[part], weight_VC, labels[:, part].contiguous()
            if torch.is_grad_enabled():
                found.append(checkpoint(losses, *given, use_reentrant=False, preserve_rng_state=False))
            else:
                found.append(losses(*given))
        return torch.cat(found, dim=-1)

    def _losses(
        self, labels: Tensor, logits: Tensor, kept: Tensor | None, taught: Tensor | None = None, lesson: Lesson | None = None
    ) -> Tensor:
        """Losses of some positions in nats: [B, s], or with a teacher [2, B, s], the divergences from it last.

        Args:
            labels: [B, s].
            logits: [s, B, V], overwritten.
            kept: gets a copy of the logits, for the networks that this one teaches; None: none.
            taught: logits of the teacher [s, B, V]; None without one.
            lesson: distillation; None for none.
        """
        if kept is not None:
            kept.copy_(logits.detach())
        logits = mask_padding(logits, self.real_vocab_size)
        if taught is None:
            return super().compute_language_model_loss(labels, logits)
        divergence_BS = divergence(logits, mask_padding(taught, self.real_vocab_size), lesson.temperature).transpose(0, 1)
        return torch.stack([super().compute_language_model_loss(labels, logits), divergence_BS])  # overwrites the logits


def mask_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Set the logits of the vocabulary's padding to -1e9, so that its probability is zero: [..., V] -> [..., V].

    logits: logits of this tensor-parallel rank's part of the vocabulary. vocab_size: size without padding, over all ranks.
    """
    part = logits.shape[-1]
    real = vocab_size - parallel_state.get_tensor_model_parallel_rank() * part
    if real >= part:
        return logits
    return logits.masked_fill(torch.arange(part, device=logits.device) >= real, -1e9)
