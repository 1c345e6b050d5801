"""Sub-networks as dense models: `cut` takes the weights out of the supernet, one room a format writes them."""
