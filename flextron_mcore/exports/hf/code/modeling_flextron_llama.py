"""Llama whose layers have different widths: transformers' classes, with a configuration for each layer and no forward code."""

import copy

from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
)

from .configuration_flextron_llama import FlextronLlamaConfig


class LayerView:
    """Configuration of one layer: its own widths, and all else from the model's configuration.

    It is no copy, because set_attn_implementation changes the attention implementation in the model's configuration only.
    """

    def __init__(self, shared, layer):
        self.shared = shared
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            setattr(self, name, getattr(layer, name))

    def __getattr__(self, name):
        if name.startswith("__"):  # asked of an empty object when it is copied
            raise AttributeError(name)
        return getattr(self.shared, name)


class FlextronLlamaDecoderLayer(LlamaDecoderLayer):
    """Layer with the widths of `config.layer_config(layer_idx)`."""

    def __init__(self, config, layer_idx):
        layer = config.layer_config(layer_idx)
        super().__init__(layer, layer_idx)
        self.self_attn.config = LayerView(config, layer)


class FlextronLlamaModel(LlamaModel):
    """LlamaModel with a `FlextronLlamaDecoderLayer` for each layer."""

    config_class = FlextronLlamaConfig
    _no_split_modules = ["FlextronLlamaDecoderLayer"]

    def __init__(self, config: FlextronLlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(FlextronLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = copy.deepcopy(self.layers[0].input_layernorm)
        self.rotary_emb = LlamaRotaryEmbedding(config=config.layer_config(0))
        self.has_sliding_layers = "sliding_attention" in (getattr(config, "layer_types", None) or ())  # Qwen2, Qwen3, SmolLM3
        self.gradient_checkpointing = False
        self.post_init()


class FlextronLlamaForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM with layers of different widths."""

    config_class = FlextronLlamaConfig
    _no_split_modules = ["FlextronLlamaDecoderLayer"]

    def __init__(self, config: FlextronLlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = FlextronLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
