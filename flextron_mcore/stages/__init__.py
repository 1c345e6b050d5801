"""One small file per command: read the configuration, call the rooms, write the results."""
