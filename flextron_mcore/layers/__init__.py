"""Elastic layers: Megatron-Core's own modules, computing with real slices of their weights."""
