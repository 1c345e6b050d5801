"""GPT-2 whose layers compute the first heads, neurons and channels of the current choice, or are skipped.

Positions, masks and generation are transformers'.

Conv1D stores weights [in, out]. The outputs of c_attn are all queries, all keys, all values. Each head is a KV group.
"""

import copy
import functools
import inspect

import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2MLP,
    GPT2Attention,
    GPT2Block,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
    eager_attention_forward,
)
from transformers.pytorch_utils import Conv1D

from .configuration_flextron_elastic import FlextronElasticGPT2Config
from .flextron_elastic import ElasticForCausalLM
from .flextron_family import Family  # noqa: F401  (transformers 4 copies only files that this file imports itself)
from .flextron_parts import (
    ElasticAttention,
    ElasticEmbedding,
    ElasticLayer,
    ElasticLayerNorm,
    ElasticLinear,
    neurons_of_each,
)


def conv(x, layer, first, count):
    """Outputs `first` to `first + count - 1` of a Conv1D, from its first inputs, as many as `x` has."""
    weight, bias = layer.weight[: x.shape[-1], first : first + count], layer.bias[first : first + count]
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], count)


class ElasticGPT2Attention(ElasticAttention, GPT2Attention):
    """GPT-2 attention that computes the first KV groups and query heads."""

    eager = staticmethod(eager_attention_forward)

    def __init__(self, config, layer_idx):
        one_head = copy.copy(config)
        one_head.num_attention_heads = 1  # GPT2Attention derives the size of a head from it; corrected below
        super().__init__(one_head, layer_idx=layer_idx)
        self.config = config  # the shared one, in which set_attn_implementation changes the attention implementation
        heads, size = config.num_attention_heads, config.head_dim
        self.num_heads, self.head_dim, self.split_size, self.scaling = heads, size, heads * size, size**-0.5
        self.c_attn = Conv1D(3 * heads * size, config.hidden_size)
        self.c_proj = Conv1D(config.hidden_size, heads * size)

    @property
    def extent(self):
        return self.num_heads, 1, self.head_dim

    def _heads(self, x_NC, kind, g):
        return conv(x_NC, self.c_attn, kind * self.split_size, g * self.head_dim).view(len(x_NC), g, self.head_dim)

    def queries(self, x_NC, g, q):
        return self._heads(x_NC, 0, g)[:, :, None]

    def keys(self, x_NC, g):
        return self._heads(x_NC, 1, g)

    def values(self, x_NC, g):
        return self._heads(x_NC, 2, g)

    def projected(self, heads_NgqH, channels):
        return conv(heads_NgqH.flatten(1), self.c_proj, 0, channels)

    def forward(
        self,
        hidden_states,
        past_key_values=None,
        cache_position=None,
        attention_mask=None,
        cache=None,  # name of past_key_values since transformers 5.24
        **kwargs,
    ):
        for name in ("head_mask", "encoder_hidden_states", "encoder_attention_mask"):  # transformers 4 passes None
            kwargs.pop(name, None)
        out, weights = self.attend(
            hidden_states,
            lambda query, key: (query, key),
            attention_mask,
            past_key_values if cache is None else cache,
            {"cache_position": cache_position},
            self.attn_dropout.p if self.training else 0.0,
            **kwargs,
        )
        return self.resid_dropout(out), weights


class ElasticGPT2MLP(GPT2MLP):
    """GPT-2 MLP that computes the first neurons."""

    def __init__(self, neurons, config, layer_idx):
        super().__init__(neurons, config)
        self.neurons, self.layer_idx = neurons, layer_idx

    def forward(self, hidden_states):
        return self.dropout(neurons_of_each(self.layer_idx, hidden_states, self.neurons, self.part))

    def part(self, x, neurons):
        return conv(self.act(conv(x, self.c_fc, 0, neurons)), self.c_proj, 0, x.shape[-1])


class ElasticGPT2Block(ElasticLayer, GPT2Block):
    """GPT-2 layer with elastic parts."""

    signature = inspect.signature(GPT2Block.forward)

    def __init__(self, config, layer_idx):
        one_head = copy.copy(config)
        one_head.num_attention_heads = 1  # for GPT2Attention, which is replaced below
        super().__init__(one_head, layer_idx)
        self.ln_1 = ElasticLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = ElasticGPT2Attention(config, layer_idx)
        self.ln_2 = ElasticLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = ElasticGPT2MLP(config.n_inner or 4 * config.hidden_size, config, layer_idx)

    def entry(self):
        return self.ln_1, self.attn

    def unchanged(self, x_BSC):
        # transformers 4 returns attention weights too
        return x_BSC if self.signature.return_annotation is torch.Tensor else (x_BSC, None)


class FlextronElasticGPT2Model(GPT2Model):
    """GPT-2 model with elastic layers."""

    config_class = FlextronElasticGPT2Config
    _no_split_modules = ["ElasticGPT2Block"]

    def __init__(self, config: FlextronElasticGPT2Config):
        GPT2PreTrainedModel.__init__(self, config)
        self.embed_dim = config.hidden_size
        self.wte = ElasticEmbedding(config.vocab_size, self.embed_dim)
        self.wpe = ElasticEmbedding(config.max_position_embeddings, self.embed_dim)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(ElasticGPT2Block(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = ElasticLayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        self.model_parallel, self.device_map = False, None  # transformers 4
        self.gradient_checkpointing = False
        self._attn_implementation = config._attn_implementation
        self.post_init()


class FlextronElasticGPT2LMHeadModel(ElasticForCausalLM, GPT2LMHeadModel):
    """GPT-2 causal language model, elastic (see `ElasticForCausalLM`)."""

    config_class = FlextronElasticGPT2Config
    _no_split_modules = ["ElasticGPT2Block"]

    def __init__(self, config: FlextronElasticGPT2Config):
        GPT2PreTrainedModel.__init__(self, config)
        self.transformer = FlextronElasticGPT2Model(config)
        self.lm_head = ElasticLinear(config.n_embd, config.vocab_size, bias=False)
        self.model_parallel, self.device_map = False, None  # transformers 4
        self.post_init()

    @functools.wraps(GPT2LMHeadModel.forward)  # generate() inspects the names of the arguments
    def forward(self, *args, **kwargs):
        with self.chosen(args, kwargs):
            return super().forward(*args, **kwargs)
