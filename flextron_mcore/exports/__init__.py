"""Export of sub-networks as dense models: cut.py takes the weights out of the elastic model, each format writes them."""
