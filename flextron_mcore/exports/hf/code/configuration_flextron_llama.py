"""Configuration of a Llama whose layers have different widths: an exported Flextron sub-network.

`per_layer_config` is {"<layer>": {"num_attention_heads": n, "num_key_value_heads": n, "intermediate_size": n}}, as in
transformers 5.15 and newer. The same keys at the top level hold the largest value of any layer. `head_dim` is the same in all
layers.
"""

import copy

from transformers import LlamaConfig


class FlextronLlamaConfig(LlamaConfig):
    """LlamaConfig with `per_layer_config`."""

    model_type = "flextron_llama"

    def validate(self):
        """Skip the checks of LlamaConfig (transformers 5), which want hidden_size divisible by the number of heads."""

    def layer_config(self, layer_idx):
        """Configuration of one layer: a copy with that layer's widths."""
        if hasattr(type(self), "is_heterogeneous"):  # transformers >= 5.15
            return self.per_layer_config[layer_idx]
        config = copy.copy(self)
        for index, widths in (self.__dict__.get("per_layer_config") or {}).items():
            if int(index) == layer_idx:
                for key, value in widths.items():
                    setattr(config, key, value)
        return config
