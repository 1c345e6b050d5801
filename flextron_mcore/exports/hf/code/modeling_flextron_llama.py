"""Llama whose layers differ in width: transformers' classes, each layer built with its own configuration. No forward code."""

from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_flextron_llama import FlextronLlamaConfig


class FlextronLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config.layer_config(layer_idx), layer_idx)
        self.self_attn.config = config  # where the attention implementation is looked up, and may be changed later


class FlextronLlamaModel(LlamaModel):
    config_class = FlextronLlamaConfig
    _no_split_modules = ["FlextronLlamaDecoderLayer"]

    def __init__(self, config: FlextronLlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(FlextronLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config.layer_config(0))
        self.gradient_checkpointing = False
        self.post_init()


class FlextronLlamaForCausalLM(LlamaForCausalLM):
    config_class = FlextronLlamaConfig
    _no_split_modules = ["FlextronLlamaDecoderLayer"]

    def __init__(self, config: FlextronLlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = FlextronLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
