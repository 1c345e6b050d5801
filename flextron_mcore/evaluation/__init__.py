"""Evaluation of networks: loss and perplexity by domain, comparison of selectors, generation."""
