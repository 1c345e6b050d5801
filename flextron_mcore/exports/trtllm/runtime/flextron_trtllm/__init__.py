"""Flextron sub-networks on TensorRT-LLM's PyTorch backend. Importing this package registers the model."""

from .modeling_flextron_llama import FlextronLlamaForCausalLM

__all__ = ["FlextronLlamaForCausalLM"]
