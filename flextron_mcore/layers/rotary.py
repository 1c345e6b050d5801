"""Rotary embeddings that Megatron-Core's GPTModel has no arguments for: given frequencies, and a factor of cosines and sines.

Shape suffixes: I half of a head's rotated channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class LongRotaryEmbedding(RotaryEmbedding):
    """RotaryEmbedding of LongRoPE, whose frequencies depend on the length of the sequence.

    With a KV cache the length is the number of all tokens so far. Megatron-Core's cache holds keys before their rotation, but the
    keys of deeper layers depend on the frequencies. A generation that passes `original` must therefore compute its earlier tokens
    again (evaluation/generation.py).

    Args:
        plain: rotary embedding of the same channels, whose other options are taken.
        short, long: frequencies [I] of sequences of at most `original` positions, and of longer ones.
        original: positions of the original context.
    """

    def __init__(self, plain: RotaryEmbedding, short: Sequence[float], long: Sequence[float], original: int) -> None:
        torch.nn.Module.__init__(self)
        self.rotary_interleaved, self.cp_group = plain.rotary_interleaved, plain.cp_group
        self.seq_len_interpolation_factor = None
        self.inv_freq = plain.inv_freq
        self.frequencies_I = [plain.inv_freq.new_tensor(values) for values in (short, long)]
        self.original = original

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Rotary angles [max_seq_len, 1, 1, 2 * I] of the positions from `offset` on."""
        self.inv_freq = self.frequencies_I[offset + max_seq_len > self.original]
        return super().get_emb(max_seq_len, offset)

    def get_rotary_seq_len(  # type: ignore[override]
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor,
        transformer_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Number of positions to compute angles for: at most `original`, unless the sequence so far is longer.

        Args:
            inference_context: Megatron-Core's static KV cache; None to compute without.
            transformer, transformer_input, transformer_config, args, kwargs: as in Megatron-Core's RotaryEmbedding.
        """
        most = super().get_rotary_seq_len(inference_context, transformer, transformer_input, transformer_config, *args, **kwargs)
        context = inference_context or kwargs.get("inference_params")
        if context is None:
            return most
        now = super().get_rotary_seq_len(None, transformer, transformer_input, transformer_config)
        return most if context.sequence_len_offset + now > self.original else min(most, self.original)


def set_rotary_scale(config: TransformerConfig, scale: float) -> None:
    """Make Megatron-Core's attention multiply the cosines and sines of rotary embeddings with `scale`.

    Megatron-Core reads the attributes set here for its own YaRN: its factor is 0.1 * yarn_mscale * ln(yarn_rotary_scaling_factor)
    + 1.

    Args:
        config: configuration of the model, changed in place.
        scale: factor; 1 changes nothing.
    """
    if scale != 1:
        config.yarn_rotary_scaling_factor, config.yarn_mscale, config.yarn_mscale_all_dim = math.exp(10), scale - 1, 0.0


def rotary_scale(config: TransformerConfig) -> float:
    """Factor with which Megatron-Core's attention multiplies the cosines and sines of rotary embeddings; mostly 1."""
    return _yarn_get_concentration_factor_from_config(config)
