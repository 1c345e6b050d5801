"""Configuration of a GPT-2 whose layers differ in width: an exported Flextron sub-network.

`per_layer_config` is {"<layer>": {"num_attention_heads", "n_inner"}}, the convention of transformers 5.15 and newer; the global
values of these keys are the largest of any layer. `head_dim`, which GPT-2 does not have, is the same everywhere.
"""

import copy

from transformers import GPT2Config


class FlextronGPT2Config(GPT2Config):
    model_type = "flextron_gpt2"

    def validate(self):
        """Nothing: checks of GPT2Config (transformers 5) read widths as if they were the same in every layer."""

    def layer_config(self, layer_idx):
        """A GPT2Config-like object with the widths of one layer."""
        if hasattr(type(self), "is_heterogeneous"):  # transformers >= 5.15
            return self.per_layer_config[layer_idx]
        config = copy.copy(self)
        for index, widths in (self.__dict__.get("per_layer_config") or {}).items():
            if int(index) == layer_idx:
                for key, value in widths.items():
                    setattr(config, key, value)
        return config
