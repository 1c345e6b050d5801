"""Routers: what a budget should be spent on, learned."""
