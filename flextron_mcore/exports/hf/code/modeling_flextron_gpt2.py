"""GPT-2 whose layers have different widths: transformers' classes, with a configuration for each layer and no forward code."""

import copy

from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2LMHeadModel, GPT2Model, GPT2PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configuration_flextron_gpt2 import FlextronGPT2Config


class FlextronGPT2Block(GPT2Block):
    """Layer with the widths of `config.layer_config(layer_idx)`."""

    def __init__(self, config, layer_idx):
        layer = copy.copy(config.layer_config(layer_idx))
        heads, size = layer.num_attention_heads, config.head_dim
        layer.num_attention_heads = 1  # GPT2Attention derives the size of a head from it; corrected below
        super().__init__(layer, layer_idx)
        attention = self.attn
        attention.config = config  # the shared one, in which set_attn_implementation changes the attention implementation
        attention.num_heads, attention.head_dim, attention.split_size = heads, size, heads * size
        attention.scaling = size**-0.5
        attention.c_attn = Conv1D(3 * heads * size, config.hidden_size)
        attention.c_proj = Conv1D(config.hidden_size, heads * size)


class FlextronGPT2Model(GPT2Model):
    """GPT2Model with a `FlextronGPT2Block` for each layer."""

    config_class = FlextronGPT2Config
    _no_split_modules = ["FlextronGPT2Block"]

    def __init__(self, config: FlextronGPT2Config):
        GPT2PreTrainedModel.__init__(self, config)
        self.embed_dim = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, self.embed_dim)
        self.wpe = nn.Embedding(config.max_position_embeddings, self.embed_dim)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(FlextronGPT2Block(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        self.model_parallel, self.device_map = False, None  # transformers 4
        self.gradient_checkpointing = False
        self._attn_implementation = config._attn_implementation
        self.post_init()


class FlextronGPT2LMHeadModel(GPT2LMHeadModel):
    """GPT2LMHeadModel with layers of different widths."""

    config_class = FlextronGPT2Config
    _no_split_modules = ["FlextronGPT2Block"]

    def __init__(self, config: FlextronGPT2Config):
        GPT2PreTrainedModel.__init__(self, config)
        self.transformer = FlextronGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.model_parallel, self.device_map = False, None  # transformers 4
        self.post_init()
