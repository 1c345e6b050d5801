"""Checkpoints: storage in dealt order, reading, writing, and import from Hugging Face."""
