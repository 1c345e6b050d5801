"""Checkpoints: storage that fits every tensor-parallel size (sharding.py), reading, writing, and import from Hugging Face."""
