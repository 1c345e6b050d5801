"""`flextron launch`: plan stages as jobs, estimate their needs, check them, run them on Slurm or on this machine, follow them."""
