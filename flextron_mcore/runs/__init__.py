"""Services under the commands: output directories, resuming, chains, opened checkpoints, the chosen network."""
