"""Selectors: from budgets to a sub-network."""
