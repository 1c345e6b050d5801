"""Elastic layers: subclasses of Megatron-Core's modules that compute with slices of their weights."""
