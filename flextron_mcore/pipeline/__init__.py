"""Micro-batches through one or several networks in one flush of the pipeline, and what they yield."""
