"""Services that commands share: output directories, resuming, chains, opened checkpoints, the chosen network."""
