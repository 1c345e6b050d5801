"""Configurations of elastic models: those of the stock classes, under names of their own."""

from transformers import GPT2Config, LlamaConfig


class FlextronElasticLlamaConfig(LlamaConfig):
    model_type = "flextron_elastic_llama"

    def validate(self):
        """Nothing: LlamaConfig's own checks (transformers 5) want hidden_size divisible by the number of heads."""


class FlextronElasticGPT2Config(GPT2Config):
    """With `head_dim`, which GPT-2 does not have."""

    model_type = "flextron_elastic_gpt2"

    def validate(self):
        """Nothing: GPT2Config's own checks (transformers 5) want hidden_size divisible by the number of heads."""
