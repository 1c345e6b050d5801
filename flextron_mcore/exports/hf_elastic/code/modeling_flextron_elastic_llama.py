"""Llama whose layers compute the first heads, neurons and channels of the current choice, or are skipped.

Positions, masks and generation are transformers'.
"""

import copy
import functools
import inspect

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_flextron_elastic import FlextronElasticLlamaConfig
from .flextron_elastic import ElasticForCausalLM
from .flextron_family import Family  # noqa: F401  (transformers 4 copies only files that this file imports itself)
from .flextron_parts import ElasticAttention, ElasticEmbedding, ElasticLayer, ElasticLinear, elastic_norm, neurons_of_each


def parts(module, names, fused, sizes):
    """Weights and biases of a module's linear layers, {name: (weight, bias)}.

    names: names of the layers. fused, sizes: for a module that has one fused layer in their place (Phi-3), its name and the
    number of outputs of each part.
    """
    if hasattr(module, names[0]):
        layers = [getattr(module, name) for name in names]
        return {name: (layer.weight, layer.bias) for name, layer in zip(names, layers, strict=True)}
    weights = getattr(module, fused).weight.split(sizes)
    return {name: (weight, None) for name, weight in zip(names, weights, strict=True)}


def rows(x, part, count):
    """First `count` outputs of a linear layer, given as (weight, bias), from the first inputs, as many as `x` has."""
    weight, bias = part
    return F.linear(x, weight[:count, : x.shape[-1]], None if bias is None else bias[:count])


def columns(x, linear, channels):
    """First `channels` outputs of a linear layer, from the first inputs, as many as `x` has."""
    bias = None if linear.bias is None else linear.bias[:channels]
    return F.linear(x, linear.weight[:channels, : x.shape[-1]], bias)


class ElasticLlamaAttention(ElasticAttention, LlamaAttention):
    """Llama attention that computes the first KV groups and query heads."""

    eager = staticmethod(eager_attention_forward)

    @property
    def extent(self):
        out = self.o_proj.weight.shape[1] // self.head_dim
        return out // self.num_key_value_groups, self.num_key_value_groups, self.head_dim

    def part(self, name):
        G, Q, H = self.extent
        return parts(self, ("q_proj", "k_proj", "v_proj"), "qkv_proj", (G * Q * H, G * H, G * H))[name]

    def queries(self, x_NC, g, q):
        query_NgqH = self._queries(x_NC, g, q)
        return self.q_norm(query_NgqH) if hasattr(self, "q_norm") else query_NgqH  # Qwen3

    def _queries(self, x_NC, g, q):
        G, Q, H = self.extent
        weight, bias = self.part("q_proj")
        if q == Q:  # whole groups are the first rows
            return rows(x_NC, (weight, bias), g * q * H).view(len(x_NC), g, q, H)
        weight_GhC = weight.view(G, Q * H, -1)[:g, : q * H, : x_NC.shape[1]]
        query_GNh = torch.bmm(x_NC.expand(g, -1, -1), weight_GhC.transpose(1, 2))
        if bias is not None:
            query_GNh = query_GNh + bias.view(G, 1, Q * H)[:g, :, : q * H]
        return query_GNh.transpose(0, 1).unflatten(-1, (q, H))

    def keys(self, x_NC, g):
        key_NgH = rows(x_NC, self.part("k_proj"), g * self.head_dim).view(len(x_NC), g, self.head_dim)
        return self.k_norm(key_NgH) if hasattr(self, "k_norm") else key_NgH

    def values(self, x_NC, g):
        return rows(x_NC, self.part("v_proj"), g * self.head_dim).view(len(x_NC), g, self.head_dim)

    def projected(self, heads_NgqH, channels):
        G, Q, H = self.extent
        g, q = heads_NgqH.shape[1:3]
        if q == Q:
            return columns(heads_NgqH.flatten(1), self.o_proj, channels)
        weight_CGh = self.o_proj.weight.view(-1, G, Q * H)[:channels, :, : q * H]
        out_NC = sum(F.linear(heads_NgqH[:, group].flatten(1), weight_CGh[:, group]) for group in range(g))
        return out_NC if self.o_proj.bias is None else out_NC + self.o_proj.bias[:channels]

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        cache_position=None,
        cache=None,  # name of past_key_values since transformers 5.24
        **kwargs,
    ):
        cos, sin = position_embeddings
        turned = getattr(self, "use_rope", True)  # false in some layers of SmolLM3
        return self.attend(
            hidden_states,
            lambda query, key: apply_rotary_pos_emb(query, key, cos, sin) if turned else (query, key),
            attention_mask,
            past_key_values if cache is None else cache,
            {"sin": sin, "cos": cos, "cache_position": cache_position},
            self.attention_dropout if self.training else 0.0,
            **kwargs,
        )


class ElasticLlamaMLP(LlamaMLP):
    """Llama MLP that computes the first neurons."""

    def __init__(self, config, layer_idx):
        super().__init__(config)
        self.layer_idx, self.neurons = layer_idx, config.intermediate_size
        self.function = self.activation_fn if hasattr(self, "activation_fn") else self.act_fn

    def forward(self, x):
        return neurons_of_each(self.layer_idx, x, self.neurons, self.part)

    def part(self, x, neurons):
        names = ("up_proj",) if hasattr(self, "up_proj") and not hasattr(self, "gate_proj") else ("gate_proj", "up_proj")
        found = [rows(x, part, neurons) for part in parts(self, names, "gate_up_proj", self.neurons).values()]
        hidden = self.function(found[0])
        if len(found) > 1:  # Nemotron's has no gate
            hidden = hidden * found[1]
        return columns(hidden, self.down_proj, x.shape[-1])


class ElasticLlamaDecoderLayer(ElasticLayer, LlamaDecoderLayer):
    """Llama layer with elastic parts."""

    signature = inspect.signature(LlamaDecoderLayer.forward)

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn = ElasticLlamaAttention(config, layer_idx)
        self.mlp = ElasticLlamaMLP(config, layer_idx)
        self.input_layernorm = elastic_norm(self.input_layernorm)
        self.post_attention_layernorm = elastic_norm(self.post_attention_layernorm)

    def entry(self):
        return self.input_layernorm, self.self_attn

    def unchanged(self, x_BSC):
        return x_BSC


class FlextronElasticLlamaModel(LlamaModel):
    """Llama model with elastic layers."""

    config_class = FlextronElasticLlamaConfig
    _no_split_modules = ["ElasticLlamaDecoderLayer"]

    def __init__(self, config: FlextronElasticLlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = ElasticEmbedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(ElasticLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = copy.deepcopy(self.layers[0].input_layernorm)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.has_sliding_layers = "sliding_attention" in (getattr(config, "layer_types", None) or ())  # Qwen2, Qwen3, SmolLM3
        self.gradient_checkpointing = False
        self.post_init()


class FlextronElasticLlamaForCausalLM(ElasticForCausalLM, LlamaForCausalLM):
    """Llama causal language model, elastic (see `ElasticForCausalLM`)."""

    config_class = FlextronElasticLlamaConfig
    _no_split_modules = ["ElasticLlamaDecoderLayer"]

    def __init__(self, config: FlextronElasticLlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = FlextronElasticLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = ElasticLinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @functools.wraps(LlamaForCausalLM.forward)  # generate() inspects the names of the arguments
    def forward(self, *args, **kwargs):
        with self.chosen(args, kwargs):
            return super().forward(*args, **kwargs)
