"""Importance of neurons and heads, and sorting by it."""
