"""Routers: learned functions from a budget to candidates."""
