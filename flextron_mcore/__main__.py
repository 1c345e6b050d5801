"""Entry point of `python -m flextron_mcore STAGE ...`, which equals `flextron STAGE ...`."""

from flextron_mcore.cli import main

# Without a __spec__, multiprocessing's spawn re-imports the main module by path, as for the installed command, and so imports
# flextron_mcore.cli, which makes helper processes end with the run. By name it would skip a module called __main__.
__spec__ = None

if __name__ == "__main__":
    main()
