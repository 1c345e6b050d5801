"""Checkpoints: dealt order, the store, and import from Hugging Face."""
