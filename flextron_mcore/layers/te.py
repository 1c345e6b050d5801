"""Backend "te": Transformer Engine's norms and core attention, for any number of channels and heads.

Importing this module imports transformer_engine. It has never been run on a GPU; tests/gpu/test_te.py compares it with the local
backend there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from flextron_mcore.config import FlextronError
from flextron_mcore.layers.norm import ElasticNorm


def _options(config) -> dict[str, Any]:
    return {
        "sequence_parallel": config.sequence_parallel,
        "zero_centered_gamma": config.layernorm_zero_centered_gamma,
        "params_dtype": config.params_dtype,
        "device": "cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
    }


class _TENorm(ElasticNorm):
    """Transformer Engine's norm for the full hidden size, torch's for the first channels only.

    Transformer Engine's norms support one size. Their extra state (FP8) is left out, so that checkpoints have the same keys as
    with the backend "local".
    """

    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension: [..., c] -> [..., c]."""
        whole = x.shape[-1] == len(self.weight) and "hidden_size" not in self.state.masks
        return super(ElasticNorm, self).forward(x) if whole else super().forward(x)


class TERMSNorm(_TENorm, te.RMSNorm):
    """Root-mean-square normalisation over the last dimension.

    Args:
        config: TransformerConfig.
        hidden_size: full number of channels.
        eps: added to the mean square.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps, **_options(config))


class TELayerNorm(_TENorm, te.LayerNorm):
    """Layer normalisation over the last dimension; zero-centred with `layernorm_zero_centered_gamma`.

    Args:
        config: TransformerConfig.
        hidden_size: full number of channels.
        eps: added to the variance.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps, **_options(config))
        self.zero_centered = config.layernorm_zero_centered_gamma


class TECoreAttention(MegatronModule):
    """Core attention by Megatron-Core's TEDotProductAttention, for any number of heads.

    Transformer Engine fixes the number of heads at construction. A TEDotProductAttention has no parameters, so one is built for
    each number of heads that occurs. They are not registered as submodules, which keeps their extra state out of checkpoints.

    Raises FlextronError for a softmax_type other than "vanilla", and for context parallelism.

    Args:
        config: TransformerConfig.
        kwargs: remaining arguments of TEDotProductAttention.
    """

    def __init__(self, config, **kwargs: Any) -> None:
        super().__init__(config=config)
        if config.softmax_type != "vanilla":
            raise FlextronError(f"softmax_type={config.softmax_type!r} is not supported by the elastic attention: use 'vanilla'")
        if config.context_parallel_size > 1:
            raise FlextronError("model.context_parallel_size > 1 is not supported by the elastic attention: use 1")
        self.__dict__["attentions"] = {}  # (query heads, KV groups) of this rank -> module
        self.arguments = kwargs

    def _attention(self, heads: int, groups: int) -> TEDotProductAttention:
        """Attention for these numbers of query heads and KV groups on this rank, built when they first occur."""
        if (heads, groups) not in self.attentions:
            config, ranks = copy.copy(self.config), self.config.tensor_model_parallel_size
            config.num_attention_heads, config.num_query_groups = heads * ranks, groups * ranks
            self.attentions[heads, groups] = TEDotProductAttention(config=config, **self.arguments)
        return self.attentions[heads, groups].train(self.training)

    @staticmethod
    def as_mask(hidden: torch.Tensor) -> torch.Tensor:
        """Return the boolean mask `hidden`, True where a key is hidden, unchanged: Transformer Engine takes boolean masks."""
        return hidden

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention: query [S, B, heads, H], key and value [T, B, groups, H] -> [S, B, heads*H].

        Args:
            query, key, value: projections of the heads.
            attention_mask: boolean, True where a key is hidden, broadcastable to [B, heads, S, T]; or None.
            attn_mask_type: causal (the last query sees all keys), arbitrary (with a mask) or no mask; None for the type given to
                the constructor.
            kwargs: remaining arguments of TEDotProductAttention's forward.
        """
        attention = self._attention(query.shape[2], key.shape[2])
        kind = attn_mask_type or self.arguments["attn_mask_type"]
        # Megatron-Core decodes a single token with no mask; a window hides earlier keys all the same.
        single = kind == AttnMaskType.no_mask and self.config.window_size is not None
        if single or (kind == AttnMaskType.causal and query.shape[0] != key.shape[0]):
            kind = AttnMaskType.causal_bottom_right  # the last query sees all keys
        return attention(query, key, value, attention_mask, attn_mask_type=kind, **kwargs)
