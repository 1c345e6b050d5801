"""Transformer Engine's norms and core attention, for any number of channels and heads: the spec's backend "te".

Importing this imports transformer_engine. It has not been run: no machine with a GPU was at hand. tests/gpu/test_te.py compares
it with the local backend.
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
    """Transformer Engine's norm for all channels, torch's for a part of them: theirs is made for one size.

    Without fp8 a norm has no state but its parameters: checkpoints are those of the local backend.
    """

    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., c] -> [..., c]."""
        whole = x.shape[-1] == len(self.weight) and "hidden_size" not in self.state.masks
        return super(ElasticNorm, self).forward(x) if whole else super().forward(x)


class TERMSNorm(_TENorm, te.RMSNorm):
    """Root-mean-square normalisation over the last dimension."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps, **_options(config))


class TELayerNorm(_TENorm, te.LayerNorm):
    """Layer normalisation over the last dimension; zero-centred with `layernorm_zero_centered_gamma`."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps, **_options(config))
        self.zero_centered = config.layernorm_zero_centered_gamma


class TECoreAttention(MegatronModule):
    """Megatron-Core's TEDotProductAttention for any number of heads.

    Transformer Engine fixes the number of KV groups when the module is made; it has no parameters. So one is made for each number
    that occurs. They are no submodules: what they call their state must not get into checkpoints.
    """

    def __init__(self, config, **kwargs: Any) -> None:
        super().__init__(config=config)
        if config.softmax_type != "vanilla":
            raise FlextronError(f"softmax_type={config.softmax_type!r} is not supported by the elastic attention: use 'vanilla'")
        if config.context_parallel_size > 1:
            raise FlextronError("model.context_parallel_size > 1 is not supported by the elastic attention")
        self.__dict__["attentions"] = {}  # (query heads, KV groups) of this rank -> module
        self.arguments = kwargs

    def _attention(self, heads: int, groups: int) -> TEDotProductAttention:
        if (heads, groups) not in self.attentions:
            config, ranks = copy.copy(self.config), self.config.tensor_model_parallel_size
            config.num_attention_heads, config.num_query_groups = heads * ranks, groups * ranks
            self.attentions[heads, groups] = TEDotProductAttention(config=config, **self.arguments)
        return self.attentions[heads, groups].train(self.training)

    @staticmethod
    def as_mask(hidden: torch.Tensor) -> torch.Tensor:
        """The mask that `forward` takes: the boolean one."""
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
        """query [S, B, heads, H], key and value [T, B, groups, H] -> [S, B, heads*H]; masks as it takes them."""
        attention = self._attention(query.shape[2], key.shape[2])
        kind = attn_mask_type or self.arguments["attn_mask_type"]
        if kind == AttnMaskType.causal and query.shape[0] != key.shape[0]:
            kind = AttnMaskType.causal_bottom_right  # the last query sees all keys
        return attention(query, key, value, attention_mask, attn_mask_type=kind, **kwargs)
