"""Text to Megatron datasets: corpora, tokenizers, `prepare`, and the datasets that training and evaluation read."""
