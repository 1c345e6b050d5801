"""Evaluation: loss and perplexity a domain."""
