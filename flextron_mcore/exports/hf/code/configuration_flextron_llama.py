"""Configuration of a Llama whose layers differ in width: an exported Flextron sub-network.

`per_layer_config` is {"<layer>": {"num_attention_heads", "num_key_value_heads", "intermediate_size"}}, the convention of
transformers 5.15 and newer; the global values of these keys are the largest of any layer. `head_dim` is the same everywhere.
"""

import copy

from transformers import LlamaConfig


class FlextronLlamaConfig(LlamaConfig):
    model_type = "flextron_llama"

    def validate(self):
        """Nothing: LlamaConfig's own checks (transformers 5) want hidden_size divisible by the number of heads."""

    def layer_config(self, layer_idx):
        """A LlamaConfig-like object with the widths of one layer."""
        if hasattr(type(self), "is_heterogeneous"):  # transformers >= 5.15
            return self.per_layer_config[layer_idx]
        config = copy.copy(self)
        for index, widths in (self.__dict__.get("per_layer_config") or {}).items():
            if int(index) == layer_idx:
                for key, value in widths.items():
                    setattr(config, key, value)
        return config
