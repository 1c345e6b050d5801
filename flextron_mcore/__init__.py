"""Elastic large language models on Megatron-Core: many sub-networks in one trained model."""

__version__ = "0.1.0"
