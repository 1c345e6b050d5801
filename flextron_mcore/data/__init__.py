"""Text to Megatron data and back: corpora, tokenizer, the `prepare` step, and the datasets that training and evaluation read."""
