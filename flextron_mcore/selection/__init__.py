"""Which sub-network for a budget: selectors with one interface."""
