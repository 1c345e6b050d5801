"""Configurations of elastic models: the stock configurations with their own model_type."""

from transformers import GPT2Config, LlamaConfig


class FlextronElasticLlamaConfig(LlamaConfig):
    """LlamaConfig of an elastic model."""

    model_type = "flextron_elastic_llama"

    def validate(self):
        """Skip the checks of LlamaConfig (transformers 5), which want hidden_size divisible by the number of heads."""


class FlextronElasticGPT2Config(GPT2Config):
    """GPT2Config of an elastic model, with `head_dim`, the size of a head, which GPT-2 itself does not have."""

    model_type = "flextron_elastic_gpt2"

    def validate(self):
        """Skip the checks of GPT2Config (transformers 5), which want hidden_size divisible by the number of heads."""
