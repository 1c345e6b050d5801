"""Forward and backward passes of micro-batches through one or several networks, in one flush of the pipeline."""
