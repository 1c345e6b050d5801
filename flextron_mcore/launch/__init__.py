"""`flextron launch`: plan stages as jobs, price and check them, submit them to Slurm or run them here, follow them."""
