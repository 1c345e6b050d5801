"""Importance of neurons, heads, channels and layers, and sorting by it."""
