"""python -m flextron_mcore STAGE ... is the command `flextron STAGE ...`."""

from flextron_mcore.cli import main

if __name__ == "__main__":
    main()
