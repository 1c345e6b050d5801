"""python -m flextron_mcore STAGE ... is the command `flextron STAGE ...`."""

from flextron_mcore.cli import main

# A spawned helper process then imports this file as the main module by its path, as it does the installed command; by its name it
# would skip it, and with it what ends helpers together with the run.
__spec__ = None

if __name__ == "__main__":
    main()
