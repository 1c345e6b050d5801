"""Configuration of a GPT-2 whose layers have different widths: an exported Flextron sub-network.

`per_layer_config` is {"<layer>": {"num_attention_heads": n, "n_inner": n}}, as in transformers 5.15 and newer. The same keys at
the top level hold the largest value of any layer. `head_dim` is the size of a head in all layers; GPT-2 itself has no such key.
"""

import copy

from transformers import GPT2Config


class FlextronGPT2Config(GPT2Config):
    """GPT2Config with `per_layer_config` and `head_dim`."""

    model_type = "flextron_gpt2"

    def validate(self):
        """Skip the checks of GPT2Config (transformers 5), which assume the same widths in every layer."""

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
