"""Configuration of a DeciLM (Nemotron-NAS): a Llama whose layers have their own numbers of key-value heads and neurons.

`block_configs` has an entry for each layer. Its layer has num_attention_heads / attention.n_heads_in_group key-value heads and
2/3 x ffn.ffn_mult x hidden_size neurons, rounded down, then up to a multiple of 256. vLLM, SGLang and TensorRT-LLM read the
entries as attributes (block.attention.no_op).
"""

import copy

from transformers import LlamaConfig


class BlockConfig(dict):
    """Mapping whose entries are attributes, too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """LlamaConfig with `block_configs`."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [
            BlockConfig({name: BlockConfig(part) for name, part in block.items()}) for block in block_configs or ()
        ]

    def validate(self):
        """Skip the checks of LlamaConfig (transformers 5), which want hidden_size divisible by the number of heads."""

    def layer_config(self, layer_idx):
        """Configuration of one layer: a copy with that layer's widths."""
        config, block = copy.copy(self), self.block_configs[layer_idx]
        config.num_key_value_heads = self.num_attention_heads // block.attention.n_heads_in_group
        neurons = int(2 * block.ffn.ffn_mult * self.hidden_size / 3)
        config.intermediate_size = -(-neurons // 256) * 256
        return config
