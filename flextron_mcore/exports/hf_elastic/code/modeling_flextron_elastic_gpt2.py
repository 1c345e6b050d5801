"""GPT-2 whose layers compute a part of their heads and neurons, on a part of the channels, or are skipped.

Positions, masks and generation are transformers' own.
Its Conv1D stores weights [in, out]; c_attn's outputs are all queries, all keys, all values. Every head is a group of its own.
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
from .flextron_family import Family  # noqa: F401  (transformers 4 fetches only what this file itself imports)
from .flextron_parts import (
    ElasticAttention,
    ElasticEmbedding,
    ElasticLayer,
    ElasticLayerNorm,
    ElasticLinear,
    neurons_of_each,
)


def conv(x, layer, first, count):
    """Outputs first, first + 1, ... of a Conv1D, `count` of them, from its first inputs, as many as come in."""
    weight, bias = layer.weight[: x.shape[-1], first : first + count], layer.bias[first : first + count]
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], count)


class ElasticGPT2Attention(ElasticAttention, GPT2Attention):
    eager = staticmethod(eager_attention_forward)

    def __init__(self, config, layer_idx):
        one_head = copy.copy(config)
        one_head.num_attention_heads = 1  # GPT2Attention derives the size of a head from it; set right below
        super().__init__(one_head, layer_idx=layer_idx)
        self.config = config  # where the attention implementation is looked up, and may be changed later
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

    def forward(self, hidden_states, past_key_values=None, cache_position=None, attention_mask=None, **kwargs):
        for name in ("head_mask", "encoder_hidden_states", "encoder_attention_mask"):  # transformers 4 passes None
            kwargs.pop(name, None)
        out, weights = self.attend(
            hidden_states,
            lambda query, key: (query, key),
            attention_mask,
            past_key_values,
            {"cache_position": cache_position},
            self.attn_dropout.p if self.training else 0.0,
            **kwargs,
        )
        return self.resid_dropout(out), weights


class ElasticGPT2MLP(GPT2MLP):
    def __init__(self, neurons, config, layer_idx):
        super().__init__(neurons, config)
        self.neurons, self.layer_idx = neurons, layer_idx

    def forward(self, hidden_states):
        return self.dropout(neurons_of_each(self.layer_idx, hidden_states, self.neurons, self.part))

    def part(self, x, neurons):
        return conv(self.act(conv(x, self.c_fc, 0, neurons)), self.c_proj, 0, x.shape[-1])


class ElasticGPT2Block(ElasticLayer, GPT2Block):
    signature = inspect.signature(GPT2Block.forward)

    def __init__(self, config, layer_idx):
        one_head = copy.copy(config)
        one_head.num_attention_heads = 1  # as above: the attention is replaced
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
    config_class = FlextronElasticGPT2Config
    _no_split_modules = ["ElasticGPT2Block"]

    def __init__(self, config: FlextronElasticGPT2Config):
        GPT2PreTrainedModel.__init__(self, config)
        self.transformer = FlextronElasticGPT2Model(config)
        self.lm_head = ElasticLinear(config.n_embd, config.vocab_size, bias=False)
        self.model_parallel, self.device_map = False, None  # transformers 4
        self.post_init()

    @functools.wraps(GPT2LMHeadModel.forward)  # generate() looks at the names of the arguments
    def forward(self, *args, **kwargs):
        with self.chosen(args, kwargs):
            return super().forward(*args, **kwargs)
